"""Bamboo and TurboSparse-Mistral: Mistral's body with dReLU, relu(gate) * relu(up), which their config.json calls
`relu`.
"""

from dataclasses import replace

from convert.archs import mistral

ARCH = replace(
    mistral.ARCH,
    family="bamboo",
    architectures=("BambooForCausalLM",),
    model_type="",
    activations={"relu": "drelu"},
    # TurboSparse checkpoints carry predictors; the converter fits its own.
    skip=("model.layers.{i}.mlp.predictor.fc1.weight", "model.layers.{i}.mlp.predictor.fc2.weight"),
)
