"""Real ComfyUI servers on a stand-in for a GPU: tensors are not on the CPU, weights come and go, memory runs out."""
