"""Real text for the comparison: prose, dialogue, code, numbers, other scripts; written for this test."""

from __future__ import annotations

PROSE = """The ferry left the harbour a little after six, when the fog still lay on the water and only the tops of the masts could be
seen. Marta stood at the rail with her collar turned up and counted the buoys as they went by, the way her grandfather had taught her: red to
the left, green to the right, and never the other way around unless you were going out to sea. She was going out to sea. It took her a moment
to work out what that meant for the colours, and by then the third buoy had vanished into the grey behind them."""

SCIENCE = """Water is densest at about four degrees Celsius. When a lake cools in autumn, the water at the surface becomes heavier and sinks,
until the whole lake has reached that temperature. Cooling it further makes the surface lighter again, so the coldest water stays on top and
freezes first. The ice then insulates what lies below, and that is why fish survive the winter in a pond that is only two metres deep."""

DIALOGUE = """"You said Tuesday," she said.
"I said Tuesday if the parts came."
"And did they come?"
He looked at the boxes on the bench, none of which had been opened. "In a manner of speaking," he said, and went to put the kettle on."""

INSTRUCTION = """To make bread at home you need flour, water, salt and yeast. Mix 500 grams of flour with 350 millilitres of lukewarm water, add ten
grams of salt and a teaspoon of dried yeast, and knead for ten minutes. Let the dough rest under a cloth until it has doubled in size. Fold it
twice, shape a loaf, wait another forty minutes, and bake it at 230 degrees until the crust is dark and it sounds hollow when you knock."""

CODE = '''def median(values: list[float]) -> float:
    """Middle value of a list; the mean of the two middle ones when their number is even."""
    if not values:
        raise ValueError("median of an empty list")
    ordered = sorted(values)
    half = len(ordered) // 2
    if len(ordered) % 2 == 1:
        return ordered[half]
    return (ordered[half - 1] + ordered[half]) / 2


for name, row in {"odd": [3, 1, 2], "even": [4.0, 1.5, 3.5, 2.0]}.items():
    print(f"{name:>6}: {median(row):.2f}")
'''

NUMBERS = """date,station,low,high,rain_mm
2019-03-01,Lindau,-2.4,6.1,0.0
2019-03-02,Lindau,-0.3,8.9,1.2
2019-03-03,Lindau,1.7,11.5,14.8
Sum of rain: 0.0 + 1.2 + 14.8 = 16.0 mm; 3/8 = 0.375; 17 * 23 = 391; 2^16 = 65,536; pi is 3.14159265358979."""

CHAT = """<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
Why does the moon look larger near the horizon?<|im_end|>
<|im_start|>assistant
"""

UNUSUAL = "Ærøskøbing, Łódź and São Paulo; 東京 and Ελλάδα… «C'est-à-dire», ½ × ¾ ≠ 1 — naïve? ☂☂☂   tabs\there, \n\n\nand   many    spaces."

PASSAGES = {
    "prose": PROSE, "science": SCIENCE, "dialogue": DIALOGUE, "instruction": INSTRUCTION, "code": CODE, "numbers": NUMBERS, "chat": CHAT,
    "unusual": UNUSUAL,
}  # fmt: skip
