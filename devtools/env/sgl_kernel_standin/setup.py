"""Put the .pth file at the root of site-packages, which pyproject.toml alone cannot say."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPyWithPth(build_py):
    def run(self) -> None:
        super().run()
        self.copy_file("sgl_kernel_cpu_standin.pth", self.build_lib)


setup(cmdclass={"build_py": BuildPyWithPth})
