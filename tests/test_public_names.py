"""The names that people write, held as they are: what moves behind them is nobody's business."""

import inspect
import re
import subprocess
import sys

import pytest
from typer.main import get_command

import fpe_kernels
import fpe_pipeline
import fpe_pipeline.testing
from fpe_pipeline.app.commands import app
from tests.support import arrows

KERNELS = "AttentionMap LinearMap backends beside blend concatenate join known_columns shared_attention stack"
PIPELINE = (
    "BatchRoles CombinedEdit ConceptMaps ConsistEdit Edit EditingSession Encoding FireFlowScheduler FreeFluxEdit "
    "FreePromptAuraFlowPipeline FreePromptBriaFiboPipeline FreePromptBriaPipeline FreePromptChromaPipeline "
    "FreePromptCogView3PlusPipeline FreePromptCogView4Pipeline "
    "FreePromptEdit FreePromptFlux2KleinPipeline FreePromptFlux2Pipeline FreePromptFluxPipeline "
    "FreePromptHunyuanImagePipeline FreePromptIdeogram4Pipeline FreePromptKandinsky5T2IPipeline "
    "FreePromptKrea2Pipeline FreePromptLongCatImagePipeline FreePromptLumina2Pipeline "
    "FreePromptNucleusMoEImagePipeline FreePromptOvisImagePipeline "
    "FreePromptPipeline FreePromptPipelineOutput FreePromptPixArtAlphaPipeline FreePromptPixArtSigmaPipeline "
    "FreePromptQwenImage21Pipeline FreePromptQwenImagePipeline FreePromptSD3Pipeline FreePromptXLPipeline "
    "FreePromptZImagePipeline HeatMaps Injecting Inversion JointProduct KVEdit LayerSelection LocalBlend MasaCtrlEdit "
    "MixedRows ModelCall NullText PlugAndPlayEdit Product PromptToPromptEdit Prompted RFSolverScheduler ReFlexEdit "
    "Recording Remembering SelfAttentionEdit Site StableFlowEdit Step StepWindow StyleAlignedEdit TransformerAdapter "
    "ValueInjectionEdit Watcher Watching WordMask attention_sites concept_maps ddim_scheduler editing flow_scheduler "
    "heat_maps make_edit register_adapter"
)
TESTING = "TOLERANCE DenseLayer Difference EditCheck check_edit tiny_unet words_tokenizer"
COMMANDS = ("app", "batch", "demo", "doctor", "edit", "evaluate", "heatmap", "info", "invert")
MACHINE = "--device --dtype --backend --json --quiet --traceback"
OPTIONS = {
    "app": "--model -o --output --host --port --device --dtype --backend --json --quiet --traceback",
    "batch": "--images -o --output --negative --inversion --inversion-guidance --inner-steps --early-stop --method "
    "--option --self-replace --levels --max-tokens --layers --seed --steps --guidance --size --at-once --workers "
    f"--cluster --model --threads --clip --dino --lpips jobs {MACHINE}",
    "demo": f"-o --output --steps {MACHINE}",
    "doctor": "--no-self-test --json --quiet --traceback",
    "edit": "--source --target --negative --from --image --recording --inversion --inversion-guidance --inner-steps "
    "--early-stop --method --option --self-replace --levels --max-tokens --layers --no-control --model --seed --steps "
    f"--guidance --images --sweep --size -o --output {MACHINE}",
    "evaluate": "--pairs --kinds --sweep --method --methods --images --inversion --steps --guidance --self-replace "
    "--seed --chunk --model --text-tokens --device -o --output --json --quiet --traceback",
    "heatmap": "--word --from --image --inversion --negative --model --seed --steps --guidance --size -o --output "
    f"prompt {MACHINE}",
    "info": "--method --json --quiet --traceback",
    "invert": "--prompt --source --negative --inversion --inversion-guidance --inner-steps --early-stop --method "
    f"--precision -o --output --model --steps --guidance --size image {MACHINE}",
}
METHODS = ("edit", "from_pipe", "from_pretrained", "invert", "record")


@pytest.mark.parametrize(
    ("package", "names"), [(fpe_kernels, KERNELS), (fpe_pipeline, PIPELINE), (fpe_pipeline.testing, TESTING)]
)
def test_names(package, names):
    assert sorted(package.__all__) == sorted(names.split())
    assert all(getattr(package, name) is not None for name in names.split())


def test_methods_of_the_pipeline():
    assert all(callable(getattr(fpe_pipeline.FreePromptPipeline, name)) for name in METHODS)


def test_paths_that_are_public_too():
    from fpe_pipeline.app.cli import main
    from fpe_pipeline.cli import main as public
    from fpe_pipeline.models import EARLIER, embedded_path, judge_path

    assert inspect.signature(public) == inspect.signature(main)
    assert (embedded_path() / "model_index.json").is_file() and judge_path().is_file()
    assert all((embedded_path(name) / "model_index.json").is_file() for name in EARLIER)


@pytest.mark.parametrize("module", ["fpe_pipeline", "fpe_pipeline.cli"])
def test_commands(module):
    shown = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=arrows.ROOT)
    assert shown.returncode == 0, shown.stderr
    assert all(re.search(rf"^\W+{name} ", shown.stdout, re.MULTILINE) for name in COMMANDS)


def test_options():
    """Every option of every command, by all its names."""
    commands = get_command(app).commands
    assert commands.keys() == OPTIONS.keys() == set(COMMANDS)
    for name, command in commands.items():
        assert sorted(flag for option in command.params for flag in option.opts) == sorted(OPTIONS[name].split())
