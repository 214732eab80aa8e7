"""Registration with transformers: in either order of import, cheaply, and loudly without us."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.fresh import Forks
from tests.tiny import tiny_model

from .artifact import write_artifact


def test_import_is_light() -> None:
    code = (
        "import sys, irq_convert\n"
        "heavy = {'torch', 'numpy', 'numba', 'transformers', 'safetensors', 'typer'}\n"
        "print(sorted(heavy & set(sys.modules)), irq_convert.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1)[0] == "[]"


def test_exports() -> None:
    import irq_convert

    for name in irq_convert.__all__:
        assert getattr(irq_convert, name) is not None
        assert name in dir(irq_convert)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        irq_convert.nothing  # noqa: B018
    from irq_convert import hf

    assert hf.load is irq_convert.load
    assert hf.IrqQuantizer.__name__ == "IrqQuantizer"


ORDERS = (
    "import transformers.quantizers.auto, irq_convert",
    "import transformers, irq_convert",
    "import irq_convert, transformers.quantizers.auto",
    "import irq_convert.hf.quantizer",
    "from irq_convert.hf import IrqConfig",
    "import irq_convert; irq_convert.load; import importlib; importlib.reload(irq_convert)",
)
LOAD = """
import sys
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


REGISTERED = """
{imports}
from transformers.quantizers import auto
print(auto.AUTO_QUANTIZER_MAPPING["irq"].__name__)
print(auto.AUTO_QUANTIZATION_CONFIG_MAPPING["irq"].__name__)
"""


@pytest.mark.slow
def test_an_artifact_is_loaded_by_transformers(python: Forks, tmp_path: Path) -> None:
    write_artifact(tmp_path, tiny_model())
    done = python(LOAD.format(imports="import irq_convert"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "IrqLinear"
    assert "cannot load irq artifacts" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("imports", ORDERS)
def test_any_order_of_imports(python: Forks, imports: str) -> None:
    done = python(REGISTERED.format(imports=imports))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["IrqQuantizer", "IrqConfig"]
    assert "cannot load irq artifacts" not in done.stderr


@pytest.mark.slow
def test_stock_transformers_fails_loudly(python: Forks, tmp_path: Path) -> None:
    write_artifact(tmp_path, tiny_model())
    done = python(LOAD.format(imports=""), tmp_path)
    assert done.returncode != 0
    assert "Error" in done.stderr
    assert "IrqLinear" not in done.stdout


NOT_OURS = """
import sys
import transformers.quantizers.auto
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


@pytest.mark.slow
def test_torch_registers_where_nothing_of_ours_is_imported(tmp_path: Path) -> None:
    """Though what is to know of us is on its way already when it imports torch.

    tests/jobs/evaluate/test_tasks.py does the same with PEFT.
    """
    names = [point.value for point in entry_points(group="torch.backends")]
    assert "irq_convert.autoload:install" in names, "install the package again: pip install -e ."
    write_artifact(tmp_path, tiny_model())
    args = [sys.executable, "-c", NOT_OURS, str(tmp_path)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "IrqLinear"
    assert "cannot load" not in done.stderr


FINDER = """
import sys, threading
import irq_convert
from irq_convert import autoload
for _ in range(3):
    autoload.install()
finders = [f for f in sys.meta_path if type(f).__name__ == "_Finder"]
assert len(finders) == 1
import importlib.util
assert finders[0].find_spec("json", None) is None
for _ in range(3):  # asking for a spec changes nothing
    assert importlib.util.find_spec("transformers.quantizers.auto") is not None
threads = [
    threading.Thread(target=__import__, args=("transformers.quantizers.auto",)) for _ in range(4)
]
[t.start() for t in threads]
[t.join() for t in threads]
auto = sys.modules["transformers.quantizers.auto"]
assert auto.AUTO_QUANTIZER_MAPPING["irq"].__name__ == "IrqQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["irq"].__name__ == "IrqConfig"
import inspect
assert "AUTO_QUANTIZER_MAPPING" in inspect.getsource(auto)
"""


@pytest.mark.slow
def test_finder(python: Forks) -> None:
    done = python(FINDER)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_failing_registration_does_not_reach_the_importer(python: Forks) -> None:
    done = python(
        "import sys, types\n"
        "sys.modules['irq_convert.hf.quantizer'] = None\n"
        "import irq_convert, transformers.quantizers.auto as auto\n"
        "assert 'irq' not in auto.AUTO_QUANTIZER_MAPPING"
    )
    assert done.returncode == 0, done.stderr
    assert "cannot load irq artifacts" in done.stderr


def test_configuration_is_given_back_exactly(tmp_path: Path) -> None:
    import copy

    from irq_convert.hf import IrqConfig

    write_artifact(tmp_path, tiny_model())
    raw = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config = IrqConfig.from_dict(raw)
    assert config.to_dict() == raw == dict(config) == copy.deepcopy(config).to_dict()
    assert config.to_dict() is not raw
    assert config.update(bits=2, dtype="x") == {"bits": 2, "dtype": "x"}
    assert config.to_dict() == raw
    assert config.quant_method == "irq"
    assert config.modules_to_not_convert == ["lm_head"]
    assert json.loads(config.to_json_string()) == raw
    assert config == IrqConfig(**raw)
    assert config != IrqConfig(**(raw | {"meta": {}}))
