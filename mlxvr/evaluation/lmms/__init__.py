r"""A plugin for lmms-eval, so that its users can select our models by name: `--model mlxvr`.

    LMMS_EVAL_PLUGINS=mlxvr.evaluation.lmms python -m lmms_eval --model mlxvr \
        --model_args pretrained=MODEL,mode=auto,max_frames=64 --tasks videomme --output_path logs

lmms-eval 0.7 finds models in two ways, and both lead to the same class: the variable above, which it calls deprecated,
names a package that holds `models` and `tasks`; the entry point group `lmms_eval.models` names `manifest`, and then no
variable is needed. lmms-eval reads data, writes prompts and grades. What is ours is the answer: one prefill for
questions in a row about the same video, an early exit when the first answer is sure enough, else the chain of thought.

A task's own generation limit is not followed (Video-MME's is 16 tokens, meant for models that answer with a letter):
`max_new_tokens` of the model's arguments is, 4,096 if it is not given, as in the public evaluation. Nor are its stop
words, since only the content of the box is handed back. A task's words for our model go into its YAML file under
`lmms_eval_specific_kwargs: mlxvr:`.

lmms-eval asks for PyAV below 16 and this package for 18 or newer: install lmms-eval first and this package after it.

Importing this package imports neither lmms-eval nor torch; `models.mlxvr` does.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["manifest"]


def manifest() -> "ModelManifest":
    """What lmms-eval's entry point group `lmms_eval.models` wants to know: the model's name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mlxvr", simple_class_path=f"{__name__}.models.mlxvr.Mlxvr")
