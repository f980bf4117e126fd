"""The API that an app embeds: `load` a model, `open` a clip, `ask` about it."""
