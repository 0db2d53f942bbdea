"""The KubeRay manifests against the operator's own definition of a RayJob: `python -m tests.kuberay CRD.yaml`.

The definition is config/crd/bases/ray.io_rayjobs.yaml of KubeRay, or `kubectl get crd rayjobs.ray.io -o yaml`. The API
server drops what a definition does not know without a word, so unknown fields are errors here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jsonschema
import yaml

FOLDER = Path(__file__).parent.parent / "jobs" / "launchers" / "kuberay"
MANIFESTS = tuple(sorted(FOLDER.glob("*.yaml")))


def strict(schema: Any) -> Any:
    """Return an openAPIV3Schema that refuses what the API server would drop, with what it means by int-or-string."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {name: strict(value) for name, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and "type" in schema and not is_open:
        changed["additionalProperties"] = False
    return changed


def find_faults(definition: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """Return what the definition has against a manifest, a line each."""
    group, version = manifest["apiVersion"].split("/")
    if (definition["spec"]["group"], definition["spec"]["names"]["kind"]) != (group, manifest["kind"]):
        return [f"the definition is not of {manifest['kind']}"]
    versions = {item["name"]: item for item in definition["spec"]["versions"]}
    if not versions.get(version, {}).get("served"):
        return [f"version {version} is not served; there are {', '.join(versions)}"]
    schema = strict(versions[version]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
    errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


def main(argv: list[str]) -> int:
    """Print the faults of every manifest; 1 if there are any."""
    if len(argv) != 1:
        print(__doc__)
        return 2
    definition = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
    found = 0
    for path in MANIFESTS:
        faults = find_faults(definition, yaml.safe_load(path.read_text(encoding="utf-8")))
        print("\n".join(f"{path.name}: {line}" for line in faults or ["fits"]))
        found += len(faults)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
