from pathlib import Path

from setuptools import find_packages, setup

EXPORT = ["onnx", "onnxscript", "onnxruntime"]
ECOSYSTEM = ["peft", "sentence-transformers", "trl"]
PAGES = ["playwright", "nbclient", "ipykernel"]  # to open pages in Chromium, and to run the notebook

setup(
    name="jactus-kernels",
    version="0.1.0",
    description="Make a pretrained transformer smaller and task-adapted in one step",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["jactus", "jactus.*", "jactus_kernels", "jactus_kernels.*"]),
    package_data={
        "jactus": ["py.typed", "app/page.html", "app/page.css", "app/card.md", "app/recipes/*.yaml"],
        "jactus_kernels": ["py.typed", "measured/*.csv"],
    },
    entry_points={"console_scripts": ["jactus = jactus.app.main:main"]},
    # Lower bounds only, which `make versions` tries: an installed torch satisfies its own and is never replaced.
    install_requires=[
        "torch>=2.6",
        "triton; platform_system == 'Linux'",
        "transformers>=5.1",  # 5.0 reads the pivots of some layers back as floats
        "accelerate",  # transformers imports it to load any checkpoint that carries a quantization_config
        "safetensors",
        "numpy",
        "tqdm",
        "matplotlib",
        "jinja2",  # the page and the card of a run
        "typer",
        "rich",
        "pyyaml",
        "huggingface_hub",
        "filelock",  # huggingface_hub brings it along
        "xxhash",  # checkpoint digests at memory speed; sha256 would double the time of a load
    ],
    extras_require={
        "fit": ["pandas", "pyarrow", "pillow"],
        "examples": ["pillow", "psutil"],
        "export": EXPORT,
        "eight-bit": ["bitsandbytes"],  # apart from the others, whose import it makes print a line
        "zero": ["deepspeed"],
        "ecosystem": ECOSYSTEM,  # what tests/test_ecosystem_*.py tries the package with
        "test": [
            "datasets",
            "hypothesis",
            "pytest",
            "pytest-benchmark",
            "pandas",
            "pyarrow",
            "pillow",
            "psutil",
            *PAGES,
            "setuptools>=70.1",
            *EXPORT,
            *ECOSYSTEM,
        ],
        # PEFT's CorDA imports attrs without declaring it
        "bench": ["peft", "attrs", "eigentune==0.2.0", "gguf", "onnx", "pillow"],
        "lint": ["ruff==0.17.6", "mypy==2.4.1"],
        "versions": ["tox>=4.30", "tox-uv"],
    },
)
