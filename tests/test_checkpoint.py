"""What is written opens and is laid out as promised; each way it can be damaged is refused by name."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from kernels.packed import BITS
from offload.checkpoint import Checkpoint, Recipe, is_checkpoint, read_header
from offload.checkpoint_writer import write_safetensors
from offload.errors import CheckpointError
from offload.files import read_json

CONFIG, INDEX, MANIFEST = "config.json", "model.safetensors.index.json", "manifest.json"
SHARD = "model-00003-of-00005.safetensors"
NORM = "model.layers.1.input_layernorm.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456789\n"

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def refusal(directory: Path) -> str:
    """What Checkpoint.open says of a directory that it has to refuse."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    assert caught.value.exit_code == 3
    return str(caught.value)


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


def set_header(path: Path, text: str) -> None:
    """Replace a shard's header by one of the same length, so that the file's size tells nothing."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    assert len(text.encode()) <= end - 8
    path.write_bytes(content[:8] + text.encode().ljust(end - 8) + content[end:])


def rewrite_shard(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Write one shard anew with other tensors, and its new size into the manifest."""
    path = directory / SHARD
    tensors = load_file(path)
    change(tensors)
    write_safetensors(path, tensors)

    def set_size(manifest: dict[str, Any]) -> None:
        manifest["shards"][2]["size_bytes"] = path.stat().st_size

    change_json(directory / MANIFEST, set_size)


def test_a_checkpoint_opens_with_a_layer_a_shard(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(str(tiny_checkpoint))
    assert [blob.module for blob in checkpoint.blobs] == ["", *(f"model.layers.{i}" for i in range(3)), ""]
    for blob in checkpoint.blobs[1:4]:
        assert all(name.startswith(f"{blob.module}.") for name in blob.tensors)
    assert checkpoint.recipe.group_size == 32
    assert checkpoint.nbytes == sum(spec.nbytes for blob in checkpoint.blobs for spec in blob.tensors.values())
    assert is_checkpoint(tiny_checkpoint)


def test_payloads_lie_on_pages_and_tensors_on_64_bytes(tiny_checkpoint: Path, tiny_asymmetric: Path) -> None:
    odd = 0
    for blob in Checkpoint.open(tiny_checkpoint).blobs + Checkpoint.open(tiny_asymmetric).blobs:
        assert blob.offset % 4096 == 0
        assert blob.offset + blob.nbytes == blob.path.stat().st_size
        for spec in blob.tensors.values():
            assert spec.offset % (64 if spec.nbytes % 64 == 0 else spec.dtype.itemsize) == 0
            odd += spec.nbytes % 64 != 0
    assert odd > 0


def test_safetensors_reads_each_shard_and_the_index_names_each_tensor(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    weight_map = json.loads((tiny_checkpoint / INDEX).read_text())["weight_map"]
    assert sorted(weight_map) == sorted(name for blob in checkpoint.blobs for name in blob.tensors)
    for blob in checkpoint.blobs:
        content = blob.path.read_bytes()
        tensors = load_file(blob.path)
        assert tensors.keys() == blob.tensors.keys()
        for name, tensor in tensors.items():
            spec = blob.tensors[name]
            assert weight_map[name] == blob.path.name
            start = blob.offset + spec.offset
            ours = torch.frombuffer(bytearray(content[start : start + spec.nbytes]), dtype=spec.dtype)
            assert torch.equal(ours.view(spec.shape).view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
            assert tensor.dtype == spec.dtype


def test_the_bytes_of_a_shard(tmp_path: Path) -> None:
    tensors = {
        "c": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "b": torch.tensor([5, -1]),
        "a": torch.ones(32, dtype=torch.bfloat16),
        "d": torch.zeros(8, 8),
    }
    checksums = write_safetensors(tmp_path / "s", tensors)
    header = (
        b'{"__metadata__":{"format":"pt"}'
        b',"d":{"dtype":"F32","shape":[8,8],"data_offsets":[0,256]}'
        b',"a":{"dtype":"BF16","shape":[32],"data_offsets":[256,320]}'
        b',"b":{"dtype":"I64","shape":[2],"data_offsets":[320,336]}'
        b',"c":{"dtype":"U8","shape":[3],"data_offsets":[336,339]}}'
    )
    integers = b"\x05\0\0\0\0\0\0\0" + b"\xff" * 8
    payload = bytes(256) + b"\x80\x3f" * 32 + integers + b"\x01\x02\x03"
    assert (tmp_path / "s").read_bytes() == b"\xf8\x0f\0\0\0\0\0\0" + header.ljust(4088) + payload
    assert list(checksums) == ["d", "a", "b", "c"]
    assert checksums["c"] == "ebce9b7632ae733b"
    assert checksums["d"] == "a68dfbb1d75c6e8d"


@pytest.mark.parametrize(("spare", "offset"), [(1, 4096), (0, 4096), (-1, 8192)])
def test_the_header_grows_by_pages(tmp_path: Path, spare: int, offset: int) -> None:
    around = len('{"__metadata__":{"format":"pt"},"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}')
    name = "x" * (4096 - 8 - around - spare)
    write_safetensors(tmp_path / "s", {name: torch.ones(1, dtype=torch.uint8)})
    assert read_header(tmp_path / "s")[0] == offset
    assert load_file(tmp_path / "s")[name].item() == 1


SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8])


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text('ab.é"\\\n', min_size=1, max_size=6), st.tuples(DTYPES, SHAPES), max_size=6))
def test_any_tensors_come_back(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.safetensors"
    written = {name: torch.randint(0, 100, shape).to(dtype) for name, (dtype, shape) in tensors.items()}
    checksums = write_safetensors(path, written)
    offset, specs = read_header(path)
    assert offset == 4096
    found = load_file(path)
    assert found.keys() == specs.keys() == checksums.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(found[name], tensor)
        assert (specs[name].shape, specs[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert specs[name].offset % (64 if tensor.nbytes % 64 == 0 else tensor.element_size()) == 0


@pytest.mark.parametrize("cut", [1, 100, "half"])
def test_a_truncated_payload(copy: Path, cut: int | str) -> None:
    size = (copy / SHARD).stat().st_size
    left = size // 2 if cut == "half" else size - int(cut)
    os.truncate(copy / SHARD, left)
    message = refusal(copy)
    assert message == f"{copy / SHARD}: {left} bytes, {size} in the manifest: truncated; copy it again"
    with pytest.raises(CheckpointError, match=rf"{SHARD}: {left} bytes, refused by safetensors .*truncated or damaged"):
        read_header(copy / SHARD)


def test_a_byte_appended(copy: Path) -> None:
    size = (copy / SHARD).stat().st_size
    with (copy / SHARD).open("ab") as file:
        file.write(b"\0")
    message = refusal(copy)
    assert message.startswith(f"{copy / SHARD}: {size + 1} bytes, {size} in the manifest: longer than it was written")
    with pytest.raises(CheckpointError, match="refused by safetensors"):
        read_header(copy / SHARD)


@pytest.mark.parametrize("size", [0, 7, 8])
def test_a_file_of_a_few_bytes(copy: Path, size: int) -> None:
    (copy / SHARD).write_bytes(bytes(size))
    assert f"{SHARD}: {size} bytes, " in refusal(copy)
    with pytest.raises(CheckpointError, match=rf"{SHARD}: {size} bytes, refused by safetensors"):
        read_header(copy / SHARD)


@pytest.mark.parametrize("length", ["file", 100_000_001, 2**63, 2**64 - 1])
def test_a_header_past_the_end(copy: Path, length: int | str) -> None:
    content = (copy / SHARD).read_bytes()
    size = len(content) if length == "file" else int(length)
    (copy / SHARD).write_bytes(size.to_bytes(8, "little") + content[8:])
    message = refusal(copy)
    assert message.startswith(f"{copy / SHARD}: {len(content)} bytes, refused by safetensors")


@pytest.mark.parametrize("name", [SHARD, MANIFEST, CONFIG, INDEX])
def test_a_git_lfs_pointer(copy: Path, name: str) -> None:
    (copy / name).write_text(POINTER)
    message = refusal(copy)
    assert message == (
        f"{copy / name}: a Git LFS pointer, not the file itself; run `git lfs pull` or download the model again"
    )


def test_a_tensor_twice_in_a_header(copy: Path) -> None:
    header = header_of(copy / SHARD)
    again = {**header[NORM], "dtype": "F16"}
    set_header(
        copy / SHARD, json.dumps(header, separators=(",", ":"))[:-1] + f",{json.dumps(NORM)}:{json.dumps(again)}}}"
    )
    with safe_open(copy / SHARD, framework="pt") as file:
        assert NORM in file.keys()  # noqa: SIM118  safetensors itself lets it pass, and a file is no container
    assert refusal(copy) == f"{copy / SHARD}: header: {NORM!r} stands twice"


def test_tensors_that_overlap(copy: Path) -> None:
    header = header_of(copy / SHARD)
    start, end = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [start - 64, end - 64]
    set_header(copy / SHARD, json.dumps(header, separators=(",", ":")))
    message = refusal(copy)
    assert message.startswith(f"{copy / SHARD}: ")
    assert "refused by safetensors" in message
    assert "model.layers.1." in message


def test_a_hole_between_tensors(copy: Path) -> None:
    header = header_of(copy / SHARD)
    del header[NORM]
    set_header(copy / SHARD, json.dumps(header, separators=(",", ":")))
    assert refusal(copy).startswith(f"{copy / SHARD}: ")
    assert "refused by safetensors" in refusal(copy)


@pytest.mark.parametrize("dtype", ["U16", "F8_E4M3"])
def test_a_dtype_outside_the_set(copy: Path, dtype: str) -> None:
    header = header_of(copy / SHARD)
    header[NORM]["dtype"] = dtype
    if dtype == "F8_E4M3":
        header[NORM]["shape"] = [128]
    set_header(copy / SHARD, json.dumps(header, separators=(",", ":")))
    assert refusal(copy) == (
        f"{copy / SHARD}: tensor {NORM!r} has dtype {dtype}; expected one of BF16, F16, F32, I32, I64, U8"
    )


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/abs.safetensors",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "\\\\server\\share\\x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "x.bin",
        "..",
        "",
        5,
        None,
    ],
)
def test_an_index_that_points_elsewhere(copy: Path, shard: object) -> None:
    (copy.parent / "x.safetensors").write_bytes((copy / SHARD).read_bytes())
    change_json(copy / INDEX, lambda index: index["weight_map"].update({NORM: shard}))
    assert refusal(copy) == (
        f"{copy / INDEX}: tensor {NORM!r} points to {shard!r}; expected a .safetensors file beside it"
    )


@pytest.mark.parametrize("shard", ["a\0b.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors"])
def test_a_shard_whose_name_cannot_be_a_file(copy: Path, shard: str) -> None:
    def rename(index: dict[str, Any]) -> None:
        index["weight_map"] = {name: shard if old == SHARD else old for name, old in index["weight_map"].items()}

    change_json(copy / INDEX, rename)
    change_json(copy / MANIFEST, lambda manifest: manifest["shards"][2].update({"file": shard}))
    assert "cannot be read" in refusal(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"weight_map": {', "not valid JSON .*; it is damaged or cut off"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\xfd", "not valid JSON"),
        (b'{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "not valid JSON \\('a' stands twice\\)"),
        (b"[]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"weight_map":' * 50_000, "not valid JSON"),
    ],
)
def test_a_damaged_index(copy: Path, content: bytes, message: str) -> None:
    (copy / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{INDEX}: {message}"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", [MANIFEST, CONFIG, SHARD])
def test_deep_json(copy: Path, name: str) -> None:
    if name == SHARD:
        content = (copy / SHARD).read_bytes()
        deep = b'{"a":' + b"[" * 4000
        (copy / SHARD).write_bytes(content[:8] + deep.ljust(4088) + content[4096:])
    else:
        (copy / name).write_bytes(b"[" * 100_000)
    assert refusal(copy).startswith(f"{copy / name}: ")


def test_a_huge_json_file_is_not_read(copy: Path) -> None:
    os.truncate(copy / INDEX, 1 << 30)
    assert refusal(copy) == f"{copy / INDEX}: {1 << 30} bytes; a file of this kind has at most {64 << 20}"


@pytest.mark.parametrize("name", [SHARD, INDEX, CONFIG])
def test_an_absent_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert refusal(copy) == f"{copy / name}: missing; copy or download the model again"


def test_an_absent_shard_that_no_one_names(copy: Path) -> None:
    def drop(index: dict[str, Any]) -> None:
        index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != SHARD}

    change_json(copy / INDEX, drop)
    assert refusal(copy) == f"{copy / INDEX} and manifest.json name different shards"


def test_a_tensor_missing_from_a_shard(copy: Path) -> None:
    rewrite_shard(copy, lambda tensors: tensors.pop(NORM))
    message = refusal(copy)
    assert message.startswith(f"{copy / SHARD}: 1 tensors missing ({NORM!r}); ")
    assert message.endswith(f"expected in {INDEX}")


def test_many_tensors_missing_are_counted(copy: Path) -> None:
    names = sorted(load_file(copy / SHARD))
    rewrite_shard(copy, lambda tensors: [tensors.pop(name) for name in names[:-1]])
    listed = ", ".join(map(repr, names[:5]))
    assert f"{len(names) - 1} tensors missing ({listed}, ...); {len(names)} expected" in refusal(copy)


def test_an_extra_tensor(copy: Path) -> None:
    extra = "model.layers.2.input_layernorm.weight"  # of another shard, which holds it as well
    rewrite_shard(copy, lambda tensors: tensors.update({extra: torch.ones(64, dtype=torch.bfloat16)}))
    assert refusal(copy).startswith(f"{copy / SHARD}: 1 tensors unexpected ({extra!r}); ")


def test_a_tensor_the_index_alone_knows(copy: Path) -> None:
    change_json(copy / INDEX, lambda index: index["weight_map"].update({"ghost": SHARD}))
    assert refusal(copy).startswith(f"{copy / SHARD}: 1 tensors missing ('ghost'); ")


def test_a_checksum_missing(copy: Path) -> None:
    change_json(copy / MANIFEST, lambda manifest: manifest["shards"][2]["xxh3"].pop(NORM))
    message = refusal(copy)
    assert message.startswith(f"{copy / SHARD}: 1 tensors missing ({NORM!r}); ")
    assert message.endswith("(checksums)")


def test_no_manifest(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    assert refusal(copy) == f"{copy}: no manifest.json; not a checkpoint of this toolkit, or an incomplete copy of one"
    assert is_checkpoint(copy)
    (copy / "partial").mkdir()
    assert refusal(copy) == (f"{copy}: calibration has not finished; run the same quant command again to resume it")
    assert refusal(copy / "nowhere") == f"{copy / 'nowhere'}: no such directory"


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_format_version(copy: Path, version: object) -> None:
    change_json(copy / MANIFEST, lambda manifest: manifest.update({"format_version": version}))
    assert refusal(copy) == f"{copy / MANIFEST}: format {version}, this version reads 1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["recipe"].update({"colour": "red"}), "recipe: expected the keys .*'colour'"),
        (lambda m: m["recipe"].pop("seed"), "recipe: expected the keys"),
        (lambda m: m["recipe"].update({"bits": 3}), "bits=3: expected 4 or 8"),
        (lambda m: m["recipe"].update({"group_size": 48}), "group_size=48: expected 32, 64, 128 or None"),
        (lambda m: m["recipe"].update({"ignore": 5}), "TypeError"),
        (lambda m: m.update({"recipe": []}), "recipe: expected the keys .*found list"),
        (lambda m: m.pop("recipe"), "KeyError 'recipe'"),
        (lambda m: m.pop("layer_errors"), "KeyError 'layer_errors'"),
        (lambda m: m.update({"shards": None}), "TypeError"),
        (lambda m: m["shards"].append(5), "TypeError"),
        (lambda m: m["shards"][2].pop("size_bytes"), "KeyError 'size_bytes'"),
        (lambda m: m["shards"][2].update({"file": 5}), "shard 3: "),
        (lambda m: m["shards"][2].update({"size_bytes": "many"}), "shard 3: "),
        (lambda m: m["shards"][2].update({"module": None}), "shard 3: "),
        (lambda m: m["shards"][2].update({"xxh3": sorted(m["shards"][2]["xxh3"])}), "shard 3: "),
    ],
)
def test_a_damaged_manifest(copy: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    change_json(copy / MANIFEST, change)
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: .*{message}"):
        Checkpoint.open(copy)


def test_a_shard_named_twice(copy: Path) -> None:
    change_json(copy / MANIFEST, lambda manifest: manifest["shards"].append(manifest["shards"][2]))
    assert refusal(copy) == f"{copy / INDEX} and manifest.json name different shards"


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.pop("quantization_config"),
        lambda q: q["quantization_config"].update({"quant_method": "other"}),
        lambda q: q["quantization_config"]["config_groups"]["group_0"]["weights"].update({"group_size": 64}),
        lambda q: q["quantization_config"].update({"ignore": []}),
    ],
)
def test_a_configuration_of_other_quantization(copy: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    change_json(copy / CONFIG, change)
    assert refusal(copy) == f"{copy / CONFIG}: quantization_config differs from the recipe in manifest.json"


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", [SHARD, MANIFEST, CONFIG, INDEX])
@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "directory", "dangling link", "link to itself"])
def test_what_is_not_a_regular_file(copy: Path, name: str, kind: str) -> None:
    path = copy / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to a fifo":
        os.mkfifo(copy / "fifo")
        path.symlink_to(copy / "fifo")
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(copy / "nowhere")
    else:
        path.symlink_to(path)
    message = refusal(copy)
    if name == MANIFEST and "link" in kind and "fifo" not in kind:
        assert message.startswith(f"{copy}: no manifest.json")
    elif kind == "dangling link":
        assert message == f"{path}: missing; copy or download the model again"
    elif kind == "link to itself":
        assert message.startswith(f"{path}: cannot be read (")
    else:
        assert message == f"{path}: not a regular file"


def test_links_to_files_open_as_in_the_hub_cache(tiny_checkpoint: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1234"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(tiny_checkpoint.iterdir())):
        shutil.copy(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    linked, plain = Checkpoint.open(snapshot), Checkpoint.open(tiny_checkpoint)
    assert [blob.tensors for blob in linked.blobs] == [blob.tensors for blob in plain.blobs]
    assert linked.recipe == plain.recipe


@pytest.mark.parametrize("bits", BITS)
def test_a_recipe_survives_json_and_refuses_what_it_does_not_know(bits: int) -> None:
    recipe = Recipe("awq", bits, None, False, ("lm_head", "a.b"), None, "ab" * 8, 3, settings={"grid": 20})
    values = json.loads(json.dumps(recipe.to_json()))
    assert Recipe.from_json(values) == recipe
    with pytest.raises(ValueError, match="'colour'"):
        Recipe.from_json({**values, "colour": "red"})
    weights = recipe.quantization_config()["config_groups"]["group_0"]["weights"]
    assert weights["num_bits"] == bits
    assert weights["strategy"] == "channel"
    assert "group_size" not in weights


def test_is_checkpoint_of_a_plain_model(tiny_model: Path, tmp_path: Path) -> None:
    assert not is_checkpoint(tiny_model)
    assert not is_checkpoint(tmp_path)
    (tmp_path / CONFIG).write_text('{"quantization_config": {}}')
    assert is_checkpoint(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        is_checkpoint(tmp_path)


def test_read_json_returns_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": {"b": [1, "é"]}}')
    assert read_json(tmp_path / "a.json") == {"a": {"b": [1, "é"]}}


SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I64": 8, "U8": 1, "F64": 8, "I16": 2, "BOOL": 1, "F8_E4M3": 1, "": 1}
ENTRIES = st.lists(
    st.tuples(
        st.text('ab"\\é\0\x1b', max_size=2),
        st.sampled_from([*SIZES, *list(SIZES)[:6] * 4]),
        st.lists(st.integers(0, 4), max_size=3),
    ),
    max_size=4,
)
METADATA = st.sampled_from(
    ["", "", "", '"__metadata__":{"format":"pt"},', '"__metadata__":null,', '"__metadata__":{"a":1},']
)
FRAGMENTS = [
    *(bytes([byte]) for byte in b'"{}[],:0123456789-.e\\ a\0\xff'),
    *(b"null", b"true", b"1e3", b"-1", b"9" * 20, b"[[[[", b'"a":', b'"shape":[],', b"\xc3\xa9", b"1" * 5000),
    *(b'"U8"', b'"F64"', b'"\\ud800"', b"\\u0061", b"\xef\xbb\xbf", b'"extra":{"a":[1.5]},'),
]
EDITS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 4), st.sampled_from(FRAGMENTS)), max_size=2)
LIES = st.sampled_from([0, 0, 0, 0, 0, 0, 1, -1, 2**62])


def crafted_shard(
    entries: list[tuple[str, str, list[int]]],
    metadata: str,
    escape: bool,
    edits: list[tuple[int, int, bytes]],
    lie: int,
) -> bytes:
    """A shard written by hand, names repeated or not, with `edits` in its header and a `lie` about its length."""
    texts, offset = [], 0
    for name, dtype, shape in entries:
        end = offset + SIZES[dtype] * math.prod(shape)
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        texts.append(f"{json.dumps(name, ensure_ascii=escape)}:{json.dumps(entry)}")
        offset = end
    header = f"{{{metadata}{','.join(texts)}}}".encode()
    for at, cut, fragment in edits:
        header = header[:at] + fragment + header[at + cut :]
    header = header.ljust(-(-(8 + len(header)) // 4096) * 4096 - 8)
    return (len(header) + lie).to_bytes(8, "little") + header + bytes(i % 251 for i in range(offset))


@settings(max_examples=200, deadline=None)
@given(ENTRIES, METADATA, st.booleans(), EDITS, LIES)
@example([("a", "BOOL", [0]), ("a", "U8", [3])], "", False, [], 0)
def test_a_header_we_accept_is_one_that_safetensors_accepts(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[str, str, list[int]]],
    metadata: str,
    escape: bool,
    edits: list[tuple[int, int, bytes]],
    lie: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "crafted.safetensors"
    content = crafted_shard(entries, metadata, escape, edits, lie)
    path.write_bytes(content)
    try:
        offset, tensors = read_header(path)
    except CheckpointError:
        event("refused")
        return
    event(f"accepted with {len(tensors)} tensors")
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, spec in tensors.items():
            theirs = file.get_tensor(name)
            assert (tuple(theirs.shape), theirs.dtype) == (spec.shape, spec.dtype)
            raw = content[offset + spec.offset :][: spec.nbytes]
            assert theirs.reshape(-1).view(torch.uint8).numpy().tobytes() == raw


def test_a_crafted_header_is_accepted_unless_a_name_repeats(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(crafted_shard([("a", "U8", [3, 1]), ('"\x1b', "BF16", [])], "", True, [], 0))
    offset, tensors = read_header(path)
    assert offset == 4096
    assert {name: (spec.offset, spec.nbytes, spec.shape) for name, spec in tensors.items()} == {
        "a": (0, 3, (3, 1)),
        '"\x1b': (3, 2, ()),
    }
    path.write_bytes(crafted_shard([("a", "U8", [0]), ("a", "U8", [3])], "", True, [], 0))
    with pytest.raises(CheckpointError, match=r"s: header: 'a' stands twice"):
        read_header(path)
