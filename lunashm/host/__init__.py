"""The host process: loads, freezes and lends. Imports no client code, no ComfyUI, no diffusers (I10)."""
