"""The top of the page: one sentence that says what was won, against what, and whether it is beyond noise; the facts."""

from collections.abc import Callable
from html import escape

from fastlightgen.metrics.scores import BETTER, SAME, SCORES, WORSE, score
from fastlightgen.metrics.speed import clocked, warning
from fastlightgen.page.html import fact

FIRST = ("adherence", "frechet", "kid", "recall", "texture", "motion")  # the scores that the sentence names first
ONE_SEED = "another training seed can differ by more"
INTERVAL = "the interval of the paired difference excludes 0 (95% for all scores together)"
NAMED = 2  # scores that it names with their values


def cost(record: dict) -> int:
    """Block evaluations per clip: evaluations of the network times its running blocks."""
    return record["sampler"]["evaluations"] * record["num_blocks"]


def sentence(found: dict) -> str:
    """What the student won and lost against its teacher, in bold; then against the teacher in as many steps."""
    evals = found["evals"]
    student, teacher, few = (sampled(evals, n) for n in ("student", "teacher", "teacher-few"))
    if not student:
        return " ".join(part for part in (escape(unscored(found)), on_caches(found)) if part)
    kept, all_ = student["num_blocks"], found["blocks"]
    made = f"The student makes a clip in {steps_of(student)} with {f'{kept} of ' * (kept < all_)}{count(all_, 'block')}"
    if speed := found["speed"]:
        made += f", {speed['theory']:.1f} times cheaper than its teacher (counted; {speed['measured']:.1f} measured)"
    if not teacher:
        return f"<b>{escape(made)}.</b>"
    made += f"; against the teacher in {steps_of(teacher)} it is "
    out = f"<b>{escape(made + verdict(student, teacher, student.get('against_teacher', {})))}.</b>"
    if few and (pairs := student.get("against", {}).get("teacher-few")):
        made = (
            f"Against the teacher in {steps_of(few)}, which cost {cost(few) / cost(student):.3g} times as much, it is "
        )
        out += f" {escape(made + verdict(student, few, pairs))}."
    return f"{out} {noise(count(student['clips'], 'clip'))}" if student.get("against_teacher") else out


def noise(over: str) -> str:
    """What the sentence counts as beyond noise."""
    return f"<small>Beyond noise: {INTERVAL}, over {over}; {ONE_SEED}.</small>"


def is_cached(record: dict) -> bool:
    """Is it a record of `evaluate data=CACHE`?"""
    return "data" in record and "videos" not in record


def on_caches(found: dict) -> str:
    """What `evaluate data=CACHE teacher=DIR` says of networks, for each of its files."""
    parts, ranked = [], False
    for record in filter(is_cached, found["real"].values()):
        said = f"On {count(record['clips'], 'clip')} of {record['data']} that training held out, {record['title']} is"
        if pairs := record.get("against_teacher"):
            said += f", against its teacher, {balance(pairs, list(pairs), str)}"
            ranked = True
        else:
            why = "its teacher was not sampled (teacher=DIR)" if "teacher" not in record else "the clips are too few"
            said += f" not ranked: {why}"
        parts.append(f"<b>{escape(said)}.</b>")
    return " ".join([*parts, noise("clips")] if ranked else parts)


def sampled(evals: dict, name: str) -> dict | None:
    """A model's evaluation, if there is one and it says how the model was sampled."""
    found = evals.get(name)
    return found if found and "sampler" in found else None


def steps_of(record: dict) -> str:
    return count(record["sampler"]["steps"], "step")


def count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


def verdict(student: dict, other: dict, pairs: dict[str, dict]) -> str:
    """Which scores are better, worse and not different; `pairs`: score -> its paired difference to the other model."""
    if not pairs:
        return f"not ranked: {count(student['clips'], 'clip')} are too few to tell a difference from noise"
    names = [k for k in dict.fromkeys([*FIRST, *SCORES]) if k in pairs]
    return balance(pairs, names, lambda k: f"{title(k)} {score(student, k)} against {score(other, k)}", NAMED)


def balance(pairs: dict[str, dict], names: list[str], named: Callable[[str], str], most: int | None = None) -> str:
    """In how many scores a model is better, worse and not different; the first `most` of each are named (None: all)."""
    keys = {word: [k for k in names if pairs[k]["verdict"] == word] for word in (BETTER, WORSE, SAME)}

    def part(word: str) -> str:
        shown = [named(k) for k in keys[word][:most]]
        return f"{word} in {len(keys[word]) or 'none'}" + f" ({', '.join(shown)})" * bool(shown)

    equal = f"not different beyond noise in {len(keys[SAME]) or 'none'}"
    return f"{part(BETTER)}, {part(WORSE)} and {equal} of {count(len(names), 'score')}"


def title(key: str) -> str:
    """A score's title inside a sentence; Fréchet keeps its capital."""
    text = SCORES[key][0]
    return text if key == "frechet" else text[0].lower() + text[1:]


def unscored(found: dict) -> str:
    """The sentence of a run without scores of a student."""
    card, blocks = found["card"], len(found["importance"].get("units", []))
    if not card.get("ladder"):
        done = [str(n) for n in (0, 1, 2, 3) if f"stage{n}" in found["config"]]
        return f"No student yet: this run holds stage {' and '.join(done)}." if done else "No student here."
    kept = f"{len(card['kept_blocks'])} of {blocks} blocks" if blocks else count(len(card["kept_blocks"]), "block")
    data = (found["config"].get("stage3") or {}).get("data", "shapes")
    own = "evaluate data=CACHE teacher=DIR out=RUN/evaluate/cache.json measures it on held-out clips"
    reason = "it is not evaluated" if data == "shapes" else own
    made = f"The student makes a clip in {count(len(card['ladder']), 'step')} with {kept}."
    if any(map(is_cached, found["real"].values())):
        return made
    return f"{made} This page has no scores of it: {reason}."


def facts(found: dict) -> str:
    """The headline numbers: cost, share of blocks kept, adherence of the student."""
    student, teacher = sampled(found["evals"], "student"), sampled(found["evals"], "teacher")
    kept = (student or {}).get("kept_blocks") or found["importance"].get("kept")
    out = ratio(found["speed"], "cheaper than the teacher") if found["speed"] else ""
    if kept and (teacher or found["importance"]):
        out += fact(f"{len(kept) / found['blocks']:.0%}", "of the blocks kept", f"{len(kept)} of {found['blocks']}")
    if student:
        detail = f"{SCORES['adherence'][3]}; in {student['sampler']['evaluations']} network evaluations"
        if teacher:
            detail += f"; the teacher reaches {score(teacher, 'adherence')} in {teacher['sampler']['evaluations']}"
        out += fact(score(student, "adherence"), "adherence of the student", detail)
    return f'<div class="facts">{out}</div>{disagreement(found["speed"])}' if out else ""


def ratio(speed: dict, name: str) -> str:
    """The counted ratio with the measured one beside it: the measured one never stands alone."""
    detail = f"counted in block evaluations: {escape(speed['theory_formula'])}; {clocked(speed).replace('x', '×')}"
    return fact(f"{speed['theory']:.1f}×", name, detail)


def disagreement(speed: dict) -> str:
    text = warning(speed) if speed else ""
    return f'<p class="alarm">{escape(text)}</p>' if text else ""
