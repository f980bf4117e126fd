"""Where lmms-eval looks for the models of a plugin: name -> class, in the module of that name beside this file."""

__all__ = ["AVAILABLE_MODELS"]

AVAILABLE_MODELS = {"mlxvr": "Mlxvr"}
