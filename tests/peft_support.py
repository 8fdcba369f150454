"""A mark for tests that give models of transformers to PEFT: a release may ask for a PEFT that is not out yet."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION


NEEDS_PEFT = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason=f"transformers asks for PEFT {MIN_PEFT_VERSION}."
)
