"""The C++ extension; everything else is in pyproject.toml."""

import os
import platform
from pathlib import Path

from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "vbmi")]
FLAGS_BY_FILE = {
    "kernels_avx2": AVX2,
    "kernels_avx512": [*AVX2, *AVX512, "-mprefer-vector-width=512"],
}


class BuildPerIsa(BuildExtension):
    """Compiles each instruction set's kernels with its own flags."""

    def build_extensions(self) -> None:
        """Build, adding ``FLAGS_BY_FILE`` to the files it names."""
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, ext, cc_args, extra, pp_opts):  # noqa: ANN001, ANN202
            flags = FLAGS_BY_FILE.get(Path(src).stem, []) if ON_X86 else []
            compile_one(obj, src, ext, cc_args, [*extra, *flags], pp_opts)

        self.compiler._compile = compile_with_flags
        super().build_extensions()


ON_X86 = platform.machine().lower() in ("x86_64", "amd64")

NOT_FOR_SERVING = ["mdkv_vllm.eval", "mdkv_vllm.eval.*", "mdkv_vllm.testing"]
"""Left out of images, which set MDKV_SERVING_ONLY."""

setup(
    packages=find_packages(
        include=["mdkv_vllm", "mdkv_vllm.*"],
        exclude=NOT_FOR_SERVING if os.environ.get("MDKV_SERVING_ONLY") else [],
    ),
    ext_modules=[
        CppExtension(
            "mdkv_vllm._cpu",
            SOURCES,
            extra_compile_args=["-O3", "-g0", "-fopenmp", "-fvisibility=hidden"],
            extra_link_args=["-fopenmp"],
        )
    ],
    # Ninja would compile every file with the same flags.
    cmdclass={"build_ext": BuildPerIsa.with_options(use_ninja=False)},
)
