"""Holds the types of other crates that the public API shows against a list.

Each of them ties our version to another crate's: when that crate makes a breaking change, so do we. So a new one is
added to the list on purpose, with its reason, or not at all.

Usage: external_types.py RUSTDOC_JSON LIST
"""

import json
import sys

STANDARD = {"std", "core", "alloc"}


def external_types(docs):
    """Maps `crate::Type` to the places in the public API that show it."""
    places = {}

    def note(item_id, place):
        path = docs["paths"].get(str(item_id))
        if path is None or path["crate_id"] == 0:
            return
        crate = docs["external_crates"][str(path["crate_id"])]["name"]
        # What a macro of another crate writes for itself.
        if crate not in STANDARD and "__private" not in path["path"]:
            places.setdefault(f"{crate}::{path['path'][-1]}", set()).add(place)

    def walk(value, place):
        if isinstance(value, dict):
            if isinstance(value.get("path"), str) and "id" in value:
                note(value["id"], place)
            for inner in value.values():
                walk(inner, place)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, place)

    for item in docs["index"].values():
        if item["crate_id"] != 0:
            continue
        (kind, inner), = item["inner"].items()
        if kind == "impl":
            # What every type has, whoever wrote it.
            if inner["is_synthetic"] or inner["blanket_impl"] is not None:
                continue
        place = f"{item['span']['filename']}:{item['span']['begin'][0]}"
        if kind == "use":
            note(inner["id"], place)
        walk(inner, place)
    return places


def main(docs_file, list_file):
    with open(docs_file, encoding="utf-8") as file:
        found = external_types(json.load(file))
    with open(list_file, encoding="utf-8") as file:
        lines = (line.split("#")[0].strip() for line in file)
        allowed = {line for line in lines if line}
    for name in sorted(found.keys() - allowed):
        print(f"{name} is in the public API and not in {list_file}: {', '.join(sorted(found[name])[:3])}")
    for name in sorted(allowed - found.keys()):
        print(f"{name} is in {list_file} and not in the public API")
    print(f"{len(found)} types of other crates")
    return found.keys() != allowed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
