# %% [markdown]
# # Results for pandas people
#
# Every figure of a sweep is in Parquet, so pandas is all you need. This page was made by running `docs/tutorial.py`
# (`python -m tests.tutorial > docs/tutorial.md`); the outputs below are what it printed. The figures are made up, so
# that anybody can run it in seconds: put your own run directory in place of `out`, such as `runs/demo`.

# %%
import tempfile

import numpy as np
import pandas as pd
from scipy import stats

import results
from results.compare.variants import read_table
from results.stats import holm, paired_documents, t_interval, welch
from tests.fake_runs import FakeVariant, fake_ablation, fake_sweep

folder = tempfile.TemporaryDirectory()
out = fake_sweep(f"{folder.name}/baseline", seeds=(42, 0, 1337))
other = fake_sweep(f"{folder.name}/changed", seeds=(42, 0, 1337), shift=-0.002)

# %% [markdown]
# ## Runs
#
# `results.load` returns one row for each attempt, failed ones too. It is the same table that
# `pandas.read_parquet("OUT/results/runs")` gives; a damaged file is warned about, one of another schema version is an
# error. The columns are listed in [schema.md](schema.md).

# %%
runs = results.load(out).sort_values("seed").set_index("seed")
print(runs[["state", "steps", "pre_ttt_bpb", "ttt_lr0_bpb", "post_ttt_bpb", "artifact_bytes"]].round(5).to_string())

# %% [markdown]
# ## A score with its uncertainty
#
# Three seeds give a mean, a sample standard deviation (ddof=1) and a t interval. One seed gives no spread: then the
# functions return None, never 0.

# %%
scores = runs["post_ttt_bpb"].tolist()
interval = t_interval(scores)
print(f"mean {np.mean(scores):.5f}, std {np.std(scores, ddof=1):.5f}, n = {len(scores)}")
print(f"95% interval {interval.low:.5f} to {interval.high:.5f}")
print("of one seed:", t_interval(scores[:1]))

# %% [markdown]
# ## The two parts of the TTT gain
#
# After minus before, so negative is better. Learning rate 0 on the TTT path has the longer context but no adaptation.

# %%
context = runs["ttt_lr0_bpb"] - runs["pre_ttt_bpb"]
adaptation = runs["post_ttt_bpb"] - runs["ttt_lr0_bpb"]
print(pd.DataFrame({"context": context, "adaptation": adaptation}).round(5).to_string())

# %% [markdown]
# ## Documents
#
# One row for each validation document and seed, with summed nats. Sum first and divide then: bits per byte of a group
# is not the mean of its documents' bits per byte.

# %%
documents = results.documents(out)
documents["length"] = pd.cut(documents["tokens"], [0, 256, 1024, 1 << 30], labels=["short", "middle", "long"])
sums = documents.groupby("length", observed=True)[["bytes", "nats_plain", "nats_lr0", "nats_ttt"]].sum()
bpb = sums.drop(columns="bytes").div(sums["bytes"] * np.log(2), axis=0)
print(bpb.round(4).to_string())

# %% [markdown]
# ## Is the change better?
#
# Different artifacts: Welch's test over seeds. The same artifacts evaluated in two ways, or the same seeds: pairs see
# more. `seedsweep compare` does both and refuses other validation text.

# %%
changed = results.load(other)
difference = welch(changed["post_ttt_bpb"].tolist(), scores)
print(f"difference {difference.mean:+.5f} bpb, one-sided p = {difference.p_better():.4f}")

# %%
a, b = results.documents(other), results.documents(out)
one = [frame[frame["seed"] == 42].sort_values("index") for frame in (a, b)]
pairs = paired_documents(one[0]["nats_ttt"], one[1]["nats_ttt"], one[1]["bytes"] * np.log(2))
print(f"seed 42, over {len(one[0])} documents: {pairs.mean:+.5f} bpb, standard error {pairs.standard_error:.5f}")

# %% [markdown]
# ## Ablations
#
# A sweep of variants has a row for each variant, seed and repeat; `variant` tells them apart. Train every variant on
# the same seeds and take differences seed by seed: what a seed does to all of them drops out. `seedsweep table` prints
# the same differences, with p corrected for the number of variants; `seedsweep compare DIR#gate DIR#base` takes one.

# %%
ablation = fake_ablation(
    f"{folder.name}/ablation",
    [
        FakeVariant("base", {42: 0.0, 0: 0.0, 1337: 0.0}),
        FakeVariant("gate", {42: -0.0041, 0: -0.0040, 1337: -0.0042}),
        FakeVariant("bits=5", {42: 0.0012, 0: -0.0003, 1337: 0.0008}, reused=("train",)),
    ],
)
scores = results.load(ablation).pivot(index="seed", columns="variant", values="post_ttt_bpb")
gaps = scores.drop(columns="base").sub(scores["base"], axis=0)
error = gaps.std(ddof=1) / np.sqrt(len(gaps))
reach = stats.t.ppf(0.975, len(gaps) - 1) * error
p = stats.t.cdf(gaps.mean() / error, len(gaps) - 1)
by_hand = pd.DataFrame({"difference": gaps.mean(), "low": gaps.mean() - reach, "high": gaps.mean() + reach, "p": p})
by_hand["p_holm"] = holm(by_hand["p"].tolist())
print(by_hand.round(5).to_string())

# %%
table = read_table(ablation)
for effect in table.effects:
    assert np.isclose(effect.difference.mean, by_hand.loc[effect.variant, "difference"])
    assert np.isclose(effect.difference.interval.low, by_hand.loc[effect.variant, "low"])
    assert np.isclose(effect.p_better_holm, by_hand.loc[effect.variant, "p_holm"])
    print(f"{effect.variant}: {effect.words}")

# %% [markdown]
# A stage that two runs have in common was computed once. The times of the run that took it are those of the run that
# computed it: leave them out of sums.

# %%
parts = results.stages(ablation)
parts["spent"] = parts["seconds"].where(parts["reused_from"].isna(), 0.0)
print(parts.groupby("variant")[["seconds", "spent"]].sum().to_string())

# %% [markdown]
# ## Steps

# %%
steps = results.steps(out)
last = steps.sort_values("step").groupby("seed").tail(1).sort_values("seed")
print(last[["seed", "step", "loss", "is_looped", "lr_factor"]].round(4).to_string(index=False))
folder.cleanup()
