"""Metadata and loose lower bounds, for users who bring their own torch; `requirements.lock` pins
what the scripts install.
"""

from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("beingvl").joinpath("version.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="beingvl",
    version=version,
    description="DeepSpeed-native training framework for Being-VL",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["beingvl", "beingvl.*"]),
    package_data={
        "beingvl.report": ["*.html", "*.css"],
        "beingvl.data": ["chat_templates/*.jinja"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.17.6",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "numpy>=1.26",
        "numba>=0.61",
        "pyarrow>=17",
        "pysimdjson>=6",
        "pillow>=10",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "tqdm>=4.66",
        "psutil>=5.9",
        "blake3>=1.0",
    ],
    extras_require={
        "quickstart": ["scikit-learn>=1.4"],
        "evaluation": ["sacrebleu>=2.4"],
        "dev": [
            "pytest>=8",
            "argcomplete>=3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "scikit-learn>=1.4",
            "llama-models",
            "sentencepiece",
            "pycocoevalcap>=1.2",
            "sacrebleu>=2.4",
            "peft>=0.18",
            "starlette>=0.40",
            "uvicorn>=0.30",
            "openai>=1.50",
            "s3fs>=2024.6",
            "moto[s3]>=5",
            "flask",
            "flask-cors",
            "mkdocs-material>=9.5",
            "bitsandbytes>=0.49",
        ],
        "completion": ["argcomplete>=3"],
        "quantized": ["bitsandbytes>=0.49"],
        "serve": ["gradio>=6.0"],
        "api": ["starlette>=0.40", "uvicorn>=0.30"],
        "remote": ["fsspec>=2024.6", "s3fs>=2024.6", "gcsfs>=2024.6", "huggingface-hub", "aiohttp"],
        "benchmark": ["scikit-learn>=1.4", "scikit-image>=0.22", "accelerate>=1.1"],
    },
    entry_points={
        "console_scripts": ["beingvl=beingvl.commands.main:main"],
        "lmms_eval.models": ["beingvl=beingvl.evaluation.lmms_eval_model:manifest"],
    },
)
