"""Package metadata; the version is said once, in `hf_moebert/__init__.py`."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "hf_moebert/__init__.py").read_text(), re.MULTILINE).group(1)
# Relative links lead nowhere on PyPI, and there is no address to complete them with: only their words stay.
README = re.sub(r"\[([^\]]+)\]\((?!https?://|#)[^)]+\)", r"\1", (ROOT / "README.md").read_text(encoding="utf-8"))
SERVE = ["fastapi", "uvicorn", "prometheus-client"]
PLOTS = ["matplotlib"]
RUNTIME = ["onnxruntime", "tokenizers"]
EXPORT = ["onnx", "onnxscript", *RUNTIME]

setup(
    name="hf_moebert",
    version=VERSION,
    description="Make pre-trained transformers smaller and faster with the stock Hugging Face tools, and prove it",
    long_description=README,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hf_moebert", "hf_moebert.*"]),
    py_modules=["hf_moebert_main"],
    package_data={"hf_moebert": ["py.typed", "**/*.pyi", "**/*.md", "**/*.yaml", "**/*.html"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.23,<6",
        "accelerate>=1.15",
        "datasets>=5.2",
        "evaluate>=0.4.6",
        "filelock>=4.3",
        "huggingface_hub>=2.4",
        "jinja2",
        "lazy_loader",
        "numpy",
        "peft>=0.21",
        "rich",
        "safetensors",
        "scikit-learn",
        "scipy",
        "seqeval",
        "typer",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "parameterized",
            "tensorly",
            "pytorch-crf==0.7.2",
            "httpx",
            "sentence-transformers>=6.2,<7",
            *SERVE,
            *PLOTS,
            *EXPORT,
        ],
        "serve": SERVE,
        "plots": PLOTS,
        "export": EXPORT,
        "runtime": RUNTIME,
        "quality": ["bandit==1.9.4", "mypy==2.4.1", "ruff==0.17.5"],
    },
    entry_points={"console_scripts": ["hf-moebert=hf_moebert_main:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
