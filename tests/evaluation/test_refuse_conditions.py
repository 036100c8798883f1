"""Prompts that a world's judge does not know are refused before anything is sampled for them."""

import pytest

from polyalign.core.errors import UserError
from polyalign.core.recipe import JudgeConfig
from polyalign.evaluation.judges import build, panel, refuse_conditions

KNOWN = {"shapes": "a red circle", "sounds": "a bell then a drum", "event_order": "a bell then a drum"}


@pytest.mark.parametrize("name", KNOWN)
def test_a_worlds_judge_refuses_what_it_does_not_know(name: str) -> None:
    known, unknown = {"prompt": KNOWN[name]}, {"prompt": "a spaceship sings"}
    judges = [panel([JudgeConfig(name=name), JudgeConfig(name=name, weight=0.5)]), build(JudgeConfig(name=name))]
    refuse_conditions(judges, [known])
    for judge in judges:
        with pytest.raises(UserError, match="does not know the prompt 'a spaceship sings'"):
            refuse_conditions([judge], [known, unknown])


def test_other_judges_take_any_prompt() -> None:
    anything, saturation = [{"prompt": "anything"}], JudgeConfig(name="saturation")
    refuse_conditions([build(saturation)], anything)
    with pytest.raises(UserError, match="the judge 'shapes'"):  # one of the two is enough
        refuse_conditions([panel([saturation, JudgeConfig(name="shapes")])], anything)
