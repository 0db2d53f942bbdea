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

import results
from results.stats import paired_documents, t_interval, welch
from tests.fake_runs import fake_sweep

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
# ## Steps

# %%
steps = results.steps(out)
last = steps.sort_values("step").groupby("seed").tail(1).sort_values("seed")
print(last[["seed", "step", "loss", "is_looped", "lr_factor"]].round(4).to_string(index=False))
folder.cleanup()
