"""Maps the top-level folders to import names under one package.

A top-level `kernels` would shadow the package of that name that transformers imports.
"""

from setuptools import find_packages, setup

MAPPED = ("routing", "kernels", "model_patches")


def _packages() -> tuple[list[str], dict[str, str]]:
    packages = find_packages(include=["vllm_lora_ext", "vllm_lora_ext.*"])
    where = {"vllm_lora_ext": "vllm_lora_ext"}
    for folder in MAPPED:
        name = f"vllm_lora_ext.{folder}"
        packages.append(name)
        where[name] = folder
        packages += [f"{name}.{sub}" for sub in find_packages(folder)]
    return packages, where


packages, package_dir = _packages()
setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        "vllm_lora_ext.kernels.gated_lora.backends.native": ["*.cpp", "*.h"],  # built at first use
        "vllm_lora_ext.model_patches": ["targets.json"],
    },
)
