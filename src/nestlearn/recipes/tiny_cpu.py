"""The demo: a byte model that two CPU cores train in minutes."""

from nestlearn.train.config import TrainConfig


def tiny_cpu() -> TrainConfig:
    """Steps of 2,048 tokens: the fast level changes at each, the middle at every 4th, the slow one at every 16th."""
    return TrainConfig(
        name="tiny-cpu",
        model={
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 448,
            "levels": [
                {"name": "fast", "period": 2_048, "hidden_size": 256},
                {"name": "middle", "period": 8_192, "hidden_size": 128},
                {"name": "slow", "period": 32_768, "hidden_size": 64},
            ],
            "memory": {"hidden_width": 32},
            "initializer_range": 128**-0.5,
        },
        tokens=850_000,
        batch_size=4,
        sequence_length=512,
        optimizer="m3",
        learning_rate=1e-2,
        adamw_scale=0.4,
        warmup=0.05,
        log_every=8_192,
        checkpoint_every=200_000,
        compare_rate_zero=True,
    )
