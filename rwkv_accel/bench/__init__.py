"""Speed and memory, measured: python -m rwkv_accel.bench. One file per case; each has measure(options) -> rows."""

CASES = {
    "wkv7": (
        "rwkv_accel.bench.wkv7",
        "WKV-7 forward and backward, time and peak memory; --device cuda: in Triton",
    ),
    "kernels": ("rwkv_accel.bench.kernels", "what compilers make of the Triton kernels, for GPUs that are not here"),
    "loss": ("rwkv_accel.bench.loss", "cross-entropy over a large head: row chunks against all logits at once"),
    "train": (
        "rwkv_accel.bench.train",
        "a LoRA training step, time and memory; --device cuda: 0.1B to 2.9B shapes, other op and layers",
    ),
    "memory": ("rwkv_accel.bench.memory", "what a LoRA step takes above its base on a GPU, by count; needs no GPU"),
    "checkpoint": ("rwkv_accel.bench.checkpoint", "a resume checkpoint: the training held up, bytes, time to go on"),
    "start": ("rwkv_accel.bench.start", "from the command to the first update of the demo"),
    "peft": ("rwkv_accel.bench.peft", "adapter layers against nn.Linear and HF peft"),
    "decode": ("rwkv_accel.bench.decode", "generation against the pip package rwkv"),
    "data": ("rwkv_accel.bench.data", "text to batches, and start-up on ten million documents"),
}
