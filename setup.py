"""Packaging of fpe-kernels: two packages, one distribution."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

VERSION = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "fpe_kernels" / "__init__.py").read_text(), re.MULTILINE
).group(1)

# Where the repository is published, such as https://github.com/OWNER/fpe-kernels: an index shows pictures and follows
# links by absolute addresses only. Without it the description has no pictures, and the words of its links.
URL = os.environ.get("FPE_PROJECT_URL", "").rstrip("/")


def description() -> str:
    """README for an index."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures, links = r"!\[([^\]]*)\]\((?!https?:)([^)]+)\)", r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)"
    text = re.sub(pictures, rf"![\1]({URL}/raw/v{VERSION}/\2)" if URL else "", text)
    return re.sub(links, rf"[\1]({URL}/blob/v{VERSION}/\2)" if URL else r"\1", text)


# Triton publishes wheels for Linux only; elsewhere the `torch` backend serves.
TRITON = "triton>=3.4; platform_system == 'Linux'"

# Older ones are wrong without a word. Before 5.6 transformers' CLIP looks for names that the embedded weights do not
# have, and draws them at random; before 0.39 diffusers' Qwen-Image attends to padding, which an edit would not (0.41 is
# the first that has most models); before 12.0 Pillow makes what is transparent in grey pictures of a palette black.
PIPELINE = ["diffusers>=0.41", "transformers>=5.6", "safetensors>=0.4", "pillow>=12.0", "numpy>=1.26"]
# What the `fpe` command is read and answered with; typer has its own option parser from 0.29 on.
PIPELINE += ["typer>=0.29", "rich>=13.7", "pydantic>=2.7"]
# The page.
APP = ["gradio>=6.20"]
# Several workers, and measures by LPIPS; CLIP and DINO are read by transformers.
CLUSTER = ["ray>=2.40"]
METRICS = ["torchmetrics>=1.5", "torchvision>=0.21", "matplotlib>=3.8"]
TRAIN = ["tokenizers>=0.20", "matplotlib>=3.8"]
BENCH = ["matplotlib>=3.8", "pytest>=8", "pytest-benchmark>=4"]
# scipy: diffusers' LMS scheduler; peft: LoRA; accelerate: offloading and loading without a copy.
TEST = ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5", "hypothesis>=6.100"]
TEST += ["scipy>=1.11", "peft>=0.13", "accelerate>=0.31"]
# torchmetrics: what measures are held against. Tests that need Ray say so where it is missing.
TEST += ["torchmetrics>=1.5"]
# playwright: drives the page in a browser, axe-playwright-python: measures it there; nbclient: runs the notebooks.
TEST += ["playwright>=1.49", "axe-playwright-python>=0.1.4", "nbformat>=5.10", "nbclient>=0.10", "ipykernel>=6.29"]
# kernels: loads the layout for Hugging Face's kernel hub.
TEST += ["kernels>=0.10", "pyyaml>=6"]
# The documentation as a site.
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]
LINT = ["ruff>=0.9", "mypy>=1.13"]
WEIGHTS = ["embedded/weights/**/*", "embedded/sd3/**/*", "embedded/earlier/**/*"]

setup(
    name="fpe-kernels",
    version=VERSION,
    description="Exact attention-map editing at fused-attention speed: Triton kernels, diffusers processors, pipelines",
    long_description=description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "attention",
        "diffusers",
        "diffusion models",
        "image editing",
        "Prompt-to-Prompt",
        "Stable Diffusion",
        "triton",
    ],
    project_urls={"Source": URL, "Changelog": f"{URL}/blob/v{VERSION}/CHANGELOG.md"} if URL else {},
    python_requires=">=3.11",
    packages=find_packages(include=["fpe_kernels*", "fpe_pipeline*"]),
    package_data={"fpe_kernels": ["py.typed"], "fpe_pipeline": ["py.typed", *WEIGHTS]},
    install_requires=["torch>=2.8", TRITON],
    extras_require={
        "pipeline": PIPELINE,
        "app": PIPELINE + APP,
        "cluster": PIPELINE + CLUSTER,
        "metrics": PIPELINE + METRICS,
        "train": PIPELINE + TRAIN,
        "bench": BENCH,
        "test": PIPELINE + APP + TRAIN + TEST,
        "docs": PIPELINE + DOCS,
        "dev": PIPELINE + APP + TRAIN + TEST + BENCH + DOCS + LINT,
    },
    entry_points={"console_scripts": ["fpe = fpe_pipeline.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
