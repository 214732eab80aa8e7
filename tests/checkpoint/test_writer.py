"""Writing shards: the reference library reads them, and nothing half-written looks whole."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from irq_convert.checkpoint.buffers import dtype_name, tensor_bytes, torch_dtype
from irq_convert.checkpoint.header import DTYPE_BITS, read_header
from irq_convert.checkpoint.reader import TileReader, matrix_shape
from irq_convert.checkpoint.system import free_bytes
from irq_convert.checkpoint.writer import ShardWriter, TensorSpec, build_header
from irq_convert.errors import IrqError
from tests.folders import assert_one_line

from .helpers import run_python

NUMPY = ["BOOL", "U8", "I8", "I16", "U16", "F16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"]
TORCH = [*NUMPY, "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]


@st.composite
def contents(draw: st.DrawFn, dtypes: list[str]) -> dict[str, torch.Tensor]:
    """Up to five tensors of random names, dtypes, shapes (empty and scalar too) and bytes."""
    names = draw(st.lists(st.text(max_size=8), max_size=5, unique=True))
    names = [name for name in names if name != "__metadata__"]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    result = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 7), max_size=3))
        dtype = torch_dtype(draw(st.sampled_from(dtypes)))
        result[name] = torch.empty(shape, dtype=dtype)
        view = tensor_bytes(result[name])
        top = 2 if dtype == torch.bool else 256
        view[:] = rng.integers(0, top, len(view), dtype=np.uint8).tobytes()
    return result


def write(path: Path, tensors: dict[str, torch.Tensor], tile: int = 1 << 20) -> None:
    """Write tensors in tiles of `tile` bytes, the last tile first."""
    specs = [TensorSpec(k, dtype_name(t.dtype), tuple(t.shape)) for k, t in tensors.items()]
    with ShardWriter(path, specs, {"format": "pt", "k": "v"}) as writer:
        for name, tensor in tensors.items():
            data = tensor_bytes(tensor)
            for at in reversed(range(0, len(data), tile)):
                writer.write(name, data[at : at + tile], at)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bytes(tensor_bytes(a.contiguous())) == bytes(tensor_bytes(b.contiguous()))
    )


@pytest.mark.slow
@settings(max_examples=150)
@given(contents(TORCH), st.integers(1, 40))
def test_reference_library_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor], tile: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "w.safetensors"
    write(path, tensors, tile)
    loaded = load_torch(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bytes(loaded[name], tensor)
    with safe_open(path, "pt") as reference:
        assert reference.metadata() == {"format": "pt", "k": "v"}
    for info in read_header(path).tensors.values():
        assert info.offset % max(1, DTYPE_BITS[info.dtype] // 8) == 0


@settings(max_examples=150)
@given(contents(TORCH), st.data())
def test_our_reader_reads_random_row_tiles(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "r.safetensors"
    write(path, tensors)
    with TileReader() as reader:
        for name, info in read_header(path).tensors.items():
            assert same_bytes(reader.read_tensor(info), tensors[name])
            rows, cols = matrix_shape(info)
            start = data.draw(st.integers(0, rows))
            stop = data.draw(st.integers(start, rows))
            want = tensors[name].reshape(rows, cols)[start:stop]
            assert same_bytes(reader.read_rows(info, start, stop), want)
            out = torch.empty_like(want).contiguous()
            assert reader.read_rows(info, start, stop, out) is out
            assert same_bytes(out, want)
            chunk = data.draw(st.integers(1, 50))
            copied = b"".join(bytes(piece) for piece in reader.iter_bytes(info, chunk))
            assert copied == bytes(tensor_bytes(tensors[name].contiguous()))


@settings(max_examples=50)
@given(contents(NUMPY))
def test_numpy_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path_factory.getbasetemp() / "n.safetensors"
    write(path, tensors)
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(
            array.reshape(-1).view(np.uint8), np.frombuffer(tensor_bytes(tensors[name]), np.uint8)
        )


def test_header_is_deterministic_and_padded() -> None:
    specs = [TensorSpec("u", "U8", (3,)), TensorSpec("d", "F64", (1,)), TensorSpec("v", "U8", (1,))]
    head = build_header(specs, {"format": "pt"})
    assert head == build_header(list(specs), {"format": "pt"})
    assert len(head) % 8 == 0
    entries = json.loads(head[8:])
    assert list(entries) == ["__metadata__", "d", "u", "v"]
    assert "__metadata__" not in json.loads(build_header(specs, {})[8:])


@pytest.mark.parametrize(
    "specs",
    [
        [TensorSpec("a", "U8", (1,)), TensorSpec("a", "I8", (2,))],
        [TensorSpec("__metadata__", "U8", (1,))],
        [TensorSpec("a", "Q4", (1,))],
        [TensorSpec("a", "U8", (-1,))],
        [TensorSpec("a", "F4", (3,))],
    ],
)
def test_impossible_specs_are_refused(tmp_path: Path, specs: list[TensorSpec]) -> None:
    with pytest.raises(ValueError, match=r"twice|dtype|negative|byte"):
        ShardWriter(tmp_path / "x", specs)
    assert not list(tmp_path.iterdir())


def test_an_oversized_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IrqError, match="smaller shards"):
        build_header([TensorSpec("n" * 100_000_001, "U8", (1,))], None)


def test_wrong_writes_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", [TensorSpec("a", "U8", (10,))]) as writer:
        writer.write("a", bytes(4), 2)
        for name, data, offset, word in (
            ("b", b"1", 0, "no tensor 'b'"),
            ("a", b"12", 9, "10 bytes"),
            ("a", b"1", -1, "10 bytes"),
            ("a", b"1", 11, "10 bytes"),
            ("a", b"1", 5, "written before"),
            ("a", b"123", 0, "written before"),
            ("a", bytes(10), 0, "written before"),
        ):
            with pytest.raises(ValueError, match=word):
                writer.write(name, data, offset)
        writer.write("a", b"", 3)
        writer.write("a", bytes(4), 6)
        writer.write("a", bytes(2), 0)
    with pytest.raises(ValueError, match="closed"):
        writer.write("a", b"1")
    with pytest.raises(ValueError, match="closed"):
        writer.commit()


def test_a_forgotten_tile_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    specs = [TensorSpec("a", "F32", (4, 2)), TensorSpec("b", "U8", (1,))]
    writer = ShardWriter(path, specs)
    writer.write("a", bytes(16))
    writer.write("b", b"1")
    with pytest.raises(IrqError) as caught, writer:
        pass
    assert_one_line(str(caught.value), str(path), "'a'", "16 of 32 bytes")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    writer = ShardWriter(path, [TensorSpec("a", "U8", (1,))])
    writer.write("a", b"1")
    with pytest.raises(error), writer:
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_commit_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    writer = ShardWriter(path, [TensorSpec("a", "U8", (1,))])
    assert path.read_text() == "old"
    writer.write("a", b"7")
    writer.commit()
    writer.discard()
    assert load_file(path)["a"].tobytes() == b"7"
    assert list(tmp_path.iterdir()) == [path]


def test_no_tensors_at_all(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", []):
        pass
    assert load_file(tmp_path / "x") == {}


def test_many_threads_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    data = np.random.default_rng(0).integers(0, 256, (64, 5000), dtype=np.uint8)
    with ShardWriter(path, [TensorSpec("a", "U8", data.shape)]) as writer:
        threads = [
            threading.Thread(
                target=lambda k: [
                    writer.write("a", data[row].tobytes(), row * 5000) for row in range(k, 64, 8)
                ],
                args=(k,),
            )
            for k in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    np.testing.assert_array_equal(load_file(path)["a"], data)


def test_disk_without_room(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    size = free_bytes(tmp_path) * 4
    with pytest.raises(IrqError) as caught:
        ShardWriter(path, [TensorSpec("a", "U8", (size,))])
    words = ["x.safetensors", "not enough space", str(size)[:3], "bytes", "free"]
    assert_one_line(str(caught.value), *words)
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_up(tmp_path: Path) -> None:
    """On a real file system of 1 MiB: reserving and writing both fail in one line."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("may not mount a file system")
    code = (
        "import sys, pathlib\n"
        "from irq_convert.checkpoint import writer, files, disk\n"
        "from irq_convert.errors import IrqError\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "writer.require_space = lambda *a: None\n"
        "for act in (lambda: writer.ShardWriter(folder / 'x', [writer.TensorSpec('a', 'U8',\n"
        "        (2 << 20,))]), lambda: files.write_bytes_atomic(folder / 'y', bytes(2 << 20))):\n"
        "    try: act(); print('written')\n"
        "    except IrqError as error: print(error)\n"
    )
    try:
        result = run_python(code, str(mount))
        assert not list(mount.iterdir())
    finally:
        subprocess.run(["umount", str(mount)], check=False)
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stderr
    for line in lines:
        assert_one_line(line, "no space left", "2097", "free")


def test_file_size_limit_is_one_line(tmp_path: Path) -> None:
    code = (
        "import sys, resource, pathlib\n"
        "from irq_convert.checkpoint.writer import ShardWriter, TensorSpec\n"
        "from irq_convert.errors import IrqError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: ShardWriter(pathlib.Path(sys.argv[1]), [TensorSpec('a', 'U8', (9999,))])\n"
        "except IrqError as error: print(error)\n"
    )
    result = run_python(code, str(tmp_path / "x"))
    assert_one_line(result.stdout.strip(), str(tmp_path / "x"), "ulimit -f")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_cannot_be_committed(tmp_path: Path) -> None:
    """A worker thread's error must not get lost when the main thread commits."""
    path = tmp_path / "x"
    writer = ShardWriter(path, [TensorSpec("a", "U8", (8,))])
    number = writer._fd
    saved = os.dup(number)
    readonly = os.open(os.devnull, os.O_RDONLY)
    os.dup2(readonly, number)  # writes now fail with EBADF
    with pytest.raises(IrqError, match="cannot write"):
        writer.write("a", bytes(8))
    os.dup2(saved, number)
    os.close(saved)
    os.close(readonly)
    with pytest.raises(IrqError, match="earlier write failed"):
        writer.commit()
    assert not list(tmp_path.iterdir())


def test_missing_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "absent" / "x", tmp_path / "file" / "x"):
        with pytest.raises(IrqError) as caught:
            ShardWriter(path, [])
        assert_one_line(str(caught.value), str(path))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="must be able to become nobody")
def test_folder_without_permission_is_one_line() -> None:
    code = (
        "import sys, os, pathlib\n"
        "from irq_convert.checkpoint import writer, disk, source, header\n"
        "from irq_convert.errors import IrqError\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "os.setegid(65534); os.seteuid(65534)\n"
        "def output():\n"
        "    with disk.output_folder(folder / 'out'): pass\n"
        "for act in (lambda: writer.ShardWriter(folder / 'x', []), output,\n"
        "            lambda: source.open_checkpoint(folder / 'closed'),\n"
        "            lambda: source.open_checkpoint(folder / 'closed' / 'in'),\n"
        "            lambda: header.read_header(folder / 'closed' / 'f')):\n"
        "    try: act(); print('done')\n"
        "    except IrqError as error: print(error)\n"
    )
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        (Path(name) / "closed").mkdir(mode=0o700)
        (Path(name) / "closed").chmod(0o700)
        result = run_python(code, name)
    lines = result.stdout.splitlines()
    if len(lines) != 5 and "ModuleNotFound" in result.stderr:
        pytest.skip("nobody may not read the interpreter's packages")
    assert len(lines) == 5, result.stdout + result.stderr
    for line in lines:
        assert ("permission denied" in line) or ("not empty" in line), line


SLOW_WRITER = """
import sys, time, pathlib
from irq_convert.checkpoint.writer import ShardWriter
from irq_convert.checkpoint.writer import TensorSpec
with ShardWriter(pathlib.Path(sys.argv[1]), [TensorSpec("a", "U8", (1 << 20,))]) as writer:
    for at in range(0, 1 << 20, 4096):
        writer.write("a", bytes(4096), at)
        print(at, flush=True)
        time.sleep(0.002)
"""


@pytest.mark.parametrize("tiles", [1, 40])
def test_a_killed_process_leaves_nothing_that_looks_whole(tmp_path: Path, tiles: int) -> None:
    path = tmp_path / "model.safetensors"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(tiles):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not path.exists()
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(".model.safetensors.tmp-")
    assert not list(tmp_path.glob("*.safetensors"))


def test_no_prefix_of_a_written_file_looks_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, {"a": torch.arange(5), "b": torch.arange(3, dtype=torch.uint8)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(IrqError):
            read_header(path)
        with pytest.raises(SafetensorError):
            safe_open(path, "pt")


@pytest.mark.slow
def test_writing_a_big_file_needs_little_memory(tmp_path: Path) -> None:
    code = (
        "import sys, resource, pathlib\n"
        "from irq_convert.checkpoint.writer import ShardWriter, TensorSpec\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "tile = bytes(8 << 20)\n"
        "with ShardWriter(pathlib.Path(sys.argv[1]), [TensorSpec('a', 'U8', (512 << 20,))]) as w:\n"
        "    for at in range(0, 512 << 20, 8 << 20): w.write('a', tile, at)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)\n"
    )
    result = run_python(code, str(tmp_path / "x"))
    assert int(result.stdout) < 24_000, result.stderr
