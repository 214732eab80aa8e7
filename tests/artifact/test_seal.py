"""The hash of a manifest over itself: no value in it changes unseen; older ones have none."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from irq_convert.artifact.manifest import SEAL, build_manifest, manifest_sha256
from irq_convert.artifact.verify import verify_artifact
from tests.folders import assert_one_line, change_json, read_json

MANIFEST = "irq_manifest.json"


def canonical(value: Any) -> str:
    """The canonical text of the specification, section 7, by hand."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{canonical(k)}:{canonical(value[k])}" for k in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, str):
        short = {"\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
        short |= {'"': '\\"', "\\": "\\\\"}

        def escape(match: re.Match[str]) -> str:
            units = match[0].encode("utf-16-be", "surrogatepass").hex()
            return short.get(match[0]) or "".join(
                f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)
            )

        return '"' + re.sub(r'["\\]|[^ -~]', escape, value) + '"'
    if value is None:
        return "null"
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value that holds a leaf."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        if isinstance(inner, dict | list) and inner:
            yield from places(inner, (*path, key))
        else:
            yield (*path, key)


def changed(value: Any, draw: random.Random) -> Any:
    """Another value of the same kind, or of another."""
    if isinstance(value, bool) or value is None or isinstance(value, dict | list):
        return draw.choice([0, "x", 1.5])
    if isinstance(value, int):
        return draw.choice([value + 1, -value - 1, float(value), str(value), None, value == 0])
    if isinstance(value, float):
        return draw.choice([value * (1 + 2**-50), value + 1e-9, str(value), None])
    return draw.choice([f"{value}x", value[:-1] if value else "x", 7, None, f"{value} "])


def test_the_writer_follows_the_specification(pristine: Path) -> None:
    manifest = read_json(pristine / MANIFEST)
    assert list(manifest)[-1] == SEAL
    noted = manifest.pop(SEAL)
    assert noted == hashlib.sha256(canonical(manifest).encode("ascii")).hexdigest()


def test_odd_text_has_one_spelling() -> None:
    odd: Any = {'ä\x7f\n"\\': "\U0001f600\ud800/", "b": [1e-7, -0.0, 10**20, 1e300, True, None, {}]}
    parts: Any = {key: {} for key in ("source", "options", "files", "tensors", "totals")}
    manifest = build_manifest(producer="ü", **(parts | {"options": odd}))
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    assert manifest[SEAL] == hashlib.sha256(canonical(rest).encode("ascii")).hexdigest()


def test_spaces_and_order_do_not_matter(artifact: Path) -> None:
    manifest = read_json(artifact / MANIFEST)
    turned = dict(reversed(manifest.items()))
    (artifact / MANIFEST).write_text(json.dumps(turned, indent=7, ensure_ascii=False))
    assert verify_artifact(artifact).ok


def test_no_value_can_change_unseen(artifact: Path) -> None:
    """Each leaf of the manifest, changed in a way drawn at random, is one line."""
    draw, manifest = random.Random(7), read_json(artifact / MANIFEST)
    every = list(places(manifest))
    assert len(every) > 90
    for path in every:
        mutated = copy.deepcopy(manifest)
        at = mutated
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = changed(at[path[-1]], draw)
        (artifact / MANIFEST).write_text(json.dumps(mutated))
        failures = verify_artifact(artifact).failures
        assert len(failures) == 1, (path, failures)
        assert_one_line(failures[0], MANIFEST)


@pytest.mark.parametrize("where", [(), ("options",), ("source",), ("totals",), ("files",)])
def test_no_key_can_be_added_or_lost_unseen(artifact: Path, where: tuple[str, ...]) -> None:
    manifest = read_json(artifact / MANIFEST)
    at = manifest
    for key in where:
        at = at[key]
    lost = next(iter(at))
    for change in (lambda part: part.update(x=1), lambda part: part.pop(lost)):
        mutated = copy.deepcopy(manifest)
        part = mutated
        for key in where:
            part = part[key]
        change(part)
        (artifact / MANIFEST).write_text(json.dumps(mutated))
        failures = verify_artifact(artifact).failures
        assert len(failures) == 1
        assert_one_line(failures[0], MANIFEST)


def test_numbers_that_are_none_are_no_traceback(artifact: Path) -> None:
    text = (artifact / MANIFEST).read_text()
    (artifact / MANIFEST).write_text(text.replace('"block_size": 64', '"block_size": NaN', 1))
    assert_one_line(*verify_artifact(artifact).failures, MANIFEST)


def test_an_older_manifest_has_no_seal_and_is_whole(artifact: Path) -> None:
    change_json(artifact / MANIFEST, lambda manifest: manifest.pop(SEAL))
    assert verify_artifact(artifact).failures == ()
    change_json(artifact / MANIFEST, lambda manifest: manifest["options"].update(refine=99))
    assert verify_artifact(artifact).failures == ()  # nothing protects it


@pytest.mark.parametrize("key", ["entropy", "entropy_plain", "relative_error"])
@pytest.mark.parametrize("how", [lambda x: x * 2 + 1, lambda x: -x, lambda x: None])
def test_totals_are_those_of_the_tensors_without_a_seal_too(
    artifact: Path, key: str, how: Any
) -> None:
    def lie(manifest: Any) -> None:
        del manifest[SEAL]
        manifest["totals"][key] = how(manifest["totals"][key])

    change_json(artifact / MANIFEST, lie)
    assert_one_line(*verify_artifact(artifact).failures, f"totals.{key} is")


def test_a_seal_of_another_manifest_is_none(artifact: Path) -> None:
    change_json(artifact / MANIFEST, lambda manifest: manifest.update({SEAL: "0" * 64}))
    (failure,) = verify_artifact(artifact).failures
    manifest = read_json(artifact / MANIFEST)
    assert_one_line(failure, SEAL, "0" * 64, manifest_sha256(manifest))
