"""Packaging of fpe-kernels: two packages, one distribution."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

VERSION = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "fpe_kernels" / "__init__.py").read_text(), re.MULTILINE
).group(1)

# Triton publishes wheels for Linux only; elsewhere the `torch` backend serves.
TRITON = "triton>=3.4; platform_system == 'Linux'"

PIPELINE = ["diffusers>=0.35", "transformers>=4.51", "safetensors>=0.4", "pillow>=10.1", "numpy>=1.26"]
TRAIN = ["tokenizers>=0.20", "matplotlib>=3.8"]
BENCH = ["matplotlib>=3.8", "pytest>=8", "pytest-benchmark>=4"]
# scipy: diffusers' LMS scheduler; peft: LoRA; accelerate: offloading and loading without a copy.
TEST = ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5", "hypothesis>=6.100"]
TEST += ["scipy>=1.11", "peft>=0.13", "accelerate>=0.31"]
LINT = ["ruff>=0.9", "mypy>=1.13"]
MODELS = ["models/embedded/**/*", "models/earlier/**/*"]

setup(
    name="fpe-kernels",
    version=VERSION,
    description="Exact attention-map editing at fused-attention speed: Triton kernels, diffusers processors, pipelines",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["fpe_kernels*", "fpe_pipeline*", "benchmarks*"]),
    package_data={"fpe_kernels": ["py.typed"], "fpe_pipeline": ["py.typed", *MODELS]},
    install_requires=["torch>=2.6", TRITON],
    extras_require={
        "pipeline": PIPELINE,
        "train": PIPELINE + TRAIN,
        "bench": BENCH,
        "test": PIPELINE + TRAIN + TEST,
        "dev": PIPELINE + TRAIN + TEST + BENCH + LINT,
    },
    entry_points={"console_scripts": ["fpe = fpe_pipeline.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: OS Independent",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
