"""What is written on the example workflows: what to choose, what to expect, what the set-up is for."""

_CHOOSE = "**Choose** your checkpoint in **model_name**; any kind will do."
_LORAS = "**Choose** two of your LoRAs in place of **character** and **style**."

NOTES = {
    "T1": f"""## T1: load through the Router

Start the host in a terminal:

**lunashm serve**

{_CHOOSE}

**Run.** The text on the right says for MODEL, CLIP and VAE how many bytes come from the host. ComfyUI's log \
says the same, with a ✓; private is next to nothing.

**Try** **daemon_mode**: **force_daemon** is an error where something cannot be shared, **force_local** does \
without the host.
""",
    "T2": f"""## T2: memory of several ComfyUIs

{_CHOOSE}

**Run** it here, then in a second ComfyUI on the same machine (**--port 8189**), then in more. The host still \
holds one copy: the text on the right counts the clients and what they save.

**lunashm top**

in a terminal shows what each process really uses. Five steps are enough: more change the time, not the memory.

**python -m bench.vram** measures all of this, with and without sharing.
""",
    "T3": f"""## T3: a stack of two LoRAs

{_CHOOSE}

{_LORAS} Tags such as **\\<lora:style:0.9\\>** in a prompt do the same.

**Run.** The log has a line for each LoRA: where its halves went, its strengths, the size of the stack so far. \
Nothing is merged: the shared weights stay as they are, and switching LoRAs reloads nothing.

The validator says beforehand which files are meant.
""",
    "T4": f"""## T4: shared and local, mixed

{_CHOOSE} The same in both Routers; and a LoRA in the stack.

One Router loads through the host, the other (**force_local**) without it. The four Gateways combine both kinds \
of MODEL with both kinds of CLIP. In each, the log says where the two halves of the LoRA went:

**MODEL shared (0.8), CLIP local (0.8)**

The four pictures are the same within rounding.
""",
    "T5": f"""## T5: several ComfyUIs at once

{_CHOOSE}

**Start** four ComfyUIs (**--port 8188** to **8191**), open this in each, give each a LoRA of its own in the tag \
**\\<lora:character:0.8\\>**, and run all of them at the same time.

Each picture is what the same ComfyUI makes alone. **lunashm clients** lists who holds what.

**daemon_mode** is **force_daemon** here: nothing is loaded twice unnoticed.
""",
    "T6": f"""## T6: when something is missing

{_CHOOSE}

**a** Stop the host (**lunashm stop**), unload the models, set **daemon_mode** to **force_daemon**: the run ends \
with an error that names the endpoint it expected, and nothing is loaded.

**b** With **auto** the same run goes on: the model is loaded locally, and log and status say why. So it does \
for a folder outside the host's roots, or when memory is short.

**c** The LoRA **nonexistent** is not there: one warning that names it, the rest is applied, the picture is \
made. The validator knew before.
""",
    "T7": f"""## T7: fifty steps

{_CHOOSE}

**Queue** it ten times (the seed counts up) and watch the memory:

**lunashm top --csv memory.csv**

writes a line a second for the host and every ComfyUI. All stay flat, from the first picture on: activations \
come and go, weights do not.
""",
    "T8": f"""## T8: LoRA strengths

{_CHOOSE} And your LoRAs in the four stacks.

The seed is the same everywhere. **Strength 0** is the picture without a LoRA, to the bit; **0.5** and **1** go \
further the same way; **two stacked** add up.

Strengths mean what they mean in the stock LoraLoader.
""",
    "second": f"""## A second model that refines

{_CHOOSE} And the second one.

The second loader uses the first model's text encoders and VAE again where they fit, and loads what does not; \
its status says which. Both models come from the host, if there is one.

Instead of a refiner any other finetune can go on where the first model stopped: **denoise** says how much of \
the picture is drawn anew.
""",
}
