"""The user's eight tests on real ComfyUI servers, one line each: ``make acceptance``.

    python -m bench.acceptance [--short] [--only T3,T5] [--comfyui PATH] [--device cpu] [--out DIR] [--json]

One module a test; what they stand on:

    scale       how much is rendered, in the full and in the short form, on a CPU and on a GPU
    stage       the host, the servers, and what they draw with
    models      checkpoints and LoRAs, and files that a host must refuse
    graphs      the same picture by stock nodes and by Luna nodes
    luna_log    what the Luna nodes and the extension say
    memory      what host, clients and device hold
    findings    what a test claims, what it saw, and its one line
    record      JSON and page of a run
"""
