"""Package metadata of Lehr. Dataflow ships it to its workers with `--setup_file`."""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ["schemas", "selection_ops", "pipelines", "trainer", "lehr"]

setup(
    name="lehr",
    version="0.1.0",
    description="Selects the data that a language model is annealed or fine-tuned on",
    long_description=Path(__file__).with_name("README.md").read_text()
    if Path(__file__).with_name("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=[f"{room}*" for room in ROOMS]),
    package_data={"lehr": ["report/*.html", "report/*.css"]},
    entry_points={"console_scripts": ["lehr = lehr.cli:main"]},
    install_requires=[
        "apache-beam>=2.77,<3",
        "duckdb>=1.4",
        "fsspec>=2025.1",
        "gcsfs>=2025.1",
        "jinja2>=3.1",
        "numpy>=2",
        "orjson>=3.10",
        "pyarrow>=25,<26",
        "rich>=13",
        "safetensors>=0.5",
        "torch>=2.9",
        "transformers>=5",
        "tyro>=1",
        "webdataset>=1.0",
    ],
    extras_require={
        "gguf": ["gguf>=0.18", "accelerate>=1", "sentencepiece>=0.2"],
        "peft": ["peft>=0.17"],
        "gcp": ["apache-beam[gcp]>=2.77,<3"],
        "s3": ["s3fs>=2025.1"],
        "dask": ["apache-beam[dask]>=2.77,<3"],
        "tensorboard": ["tensorboard>=2.18"],
        "test": [
            "apache-beam[dask,gcp]>=2.77,<3",
            "flask>=3",
            "flask-cors>=5",
            "moto[s3]>=5",
            "peft>=0.17",
            "s3fs>=2025.1",
            "pytest>=8",
            "pytest-timeout>=2",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "scipy>=1.13",
            "torchdata>=0.11",
            "tensorboard>=2.18",
        ],
        "lint": ["ruff", "mypy"],
    },
)
