"""The demo: a byte model that two CPU cores train in minutes."""

from nestlearn.train.config import TrainConfig


def tiny_cpu() -> TrainConfig:
    return TrainConfig(
        name="tiny-cpu",
        model={
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 384,
            "levels": [4096, 16384, 65536],
        },
        tokens=400_000,
        batch_size=8,
        sequence_length=512,
        learning_rate=3e-3,
        warmup=0.05,
        log_every=8_192,
        checkpoint_every=200_000,
        compare_rate_zero=True,
    )
