"""End-to-end test-time training: a sliding-window Transformer whose last MLPs learn what they read (TTT-E2E)."""

from nestlearn.train.config import TrainConfig


def ttt_e2e() -> TrainConfig:
    """An MLP more in each of the last quarter of the layers learns the next-token loss in context, by clipped SGD.

    Every 1,024 tokens, at a learned rate that starts at 0.1 after a warm-up. Small enough for a CPU; for a test, give
    for example ``sequence_length=256 meta.levels.fast.period=64``.
    """
    return TrainConfig(
        name="ttt-e2e",
        model={
            "mixer": "window_attention",
            "window": 256,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "levels": [
                {"name": "fast", "period": 1, "hidden_size": 128, "layers": 0.25},
                {"name": "mlp", "period": 1, "hidden_size": 384},
            ],
            "initializer_range": 128**-0.5,
        },
        meta={
            "order": "exact",
            "warmup": 0.1,
            "levels": {"fast": {"period": 1024, "lr": 0.1, "rule": "sgd", "clip": 1.0, "bound": "inf"}},
        },
        tokens=2_000_000,
        batch_size=4,
        sequence_length=4096,
        learning_rate=4e-3,
        weight_decay=0.01,
    )
