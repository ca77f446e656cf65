"""Your own model and training loop, with M3 where AdamW was: scikit-learn's digits and a small convolutional network.

    pip install scikit-learn
    python examples/03_your_model.py              # a few seconds

Only two lines are about the optimizer. `parameter_groups` gives the matrices to M3, and biases and the output layer to
the AdamW that M3 has on board, at the rate that AdamW had. M3's own best rate is a few times that.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from nestlearn.optim import M3, parameter_groups, parameter_table

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
order = torch.randperm(len(images))
train, test = order[:1400], order[1400:]

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
)  # fmt: skip
groups = parameter_groups(model, heads=["8"], lr=1e-2, adamw_lr=3e-3, weight_decay=0.01)  # 8 is the output layer
optimizer = M3(groups, lr=1e-2)  # was: torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
print(parameter_table(groups))

for epoch in range(5):
    for batch in train[torch.randperm(len(train))].split(50):
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
    print(f"epoch {epoch}: training loss {loss:.3f}, test accuracy {100 * accuracy:.1f} %")
