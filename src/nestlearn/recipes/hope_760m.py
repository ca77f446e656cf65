"""HOPE of 760 million parameters for 30 billion tokens (NL §8.3, Table 1).

Needs a tokenizer of 32,000 tokens.
"""

from nestlearn.train.config import TrainConfig


def hope_760m() -> TrainConfig:
    return TrainConfig(
        name="hope-760m",
        model={
            "vocab_size": 32_000,
            "hidden_size": 1536,
            "num_hidden_layers": 24,
            "num_attention_heads": 24,
            "intermediate_size": 3648,
            "levels": [1, 2**21, 2**24],  # every step, every 4 and every 32 steps
            "tie_word_embeddings": True,
        },
        tokenizer="tokenizer.json",
        tokens=30_000_000_000,
        batch_size=128,
        sequence_length=4096,
        learning_rate=4e-4,
        warmup=0.01,
        log_every=2**22,
        checkpoint_every=2**29,
        held_out_tokens=2**22,
    )
