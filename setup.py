"""Packaging; tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def requirements() -> list[str]:
    """Read requirements.txt: what to install is written once."""
    lines = (line.split("#")[0].strip() for line in (HERE / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


def version() -> str:
    """Read the version without importing the package."""
    source = (HERE / "recurrent_drafting" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1)


setup(
    name="recurrent_drafting",
    version=version(),
    description="Train and run Recurrent Drafters (ReDrafter) for Hugging Face causal language models, losslessly",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    packages=["recurrent_drafting"],
    package_data={"recurrent_drafting": ["py.typed", "data/*.safetensors", "templates/*.html"]},
    py_modules=["train_speculator", "generate_speculator", "huggingface_deployment"],
    install_requires=requirements(),
    extras_require={
        "dev": [
            "coverage>=7.10",
            "hypothesis>=6.100",
            "mypy>=1.18",
            "pre-commit>=4",
            "pytest>=8.4",
            "pytest-timeout>=2.4",
            "ruff>=0.14",
            "setuptools>=77",
            "tensorboard>=2.19",
            "types-tqdm",
            "wheel",
        ],
        "speculators": ["speculators==0.9.*"],
        "vllm": ["vllm==0.32.*"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
