"""Right and wrong answers in every usual form, and the rewards built on them."""

import math
import threading
import time

import pytest

from lorapar.data import algebra
from lorapar.data.answers import extract_answer, is_correct, marked_answer
from lorapar.errors import InputError
from lorapar.rewards import resolve_rewards

RIGHT = [
    # numbers as people write them
    ("72", "72"),
    (" 72.\n", "72"),
    ("1,000", "1000"),
    ("1000", "1,000"),
    ("1,234,567", "1234567"),
    ("$5", "5"),
    ("5", "$5"),
    ("$5.00", "5"),
    ("18$.", "18"),
    ("€24", "24"),
    (".5", "0.5"),
    ("+5", "5"),
    ("(5)", "5"),
    ("-3", "-3"),
    ("−3", "-3"),
    ("-$3", "-3"),
    ("so the result is -3", "-3"),
    ("1e3", "1000"),
    ("seven apples", "7"),
    # percent, fractions
    ("50%", "50"),
    ("50", "50%"),
    ("0.5", "50%"),
    ("50 percent", "0.5"),
    ("1/2", "0.5"),
    ("0.5", "1/2"),
    ("2 1/2", "2.5"),
    ("-2 1/2", "-2.5"),
    ("0.333333", "1/3"),
    # units
    ("18 dollars", "18"),
    ("18", "18 dollars"),
    ("60 km/h", "60"),
    ("5 m^2", "5"),
    # LaTeX and algebra
    (r"\boxed{18}", "18"),
    (r"The answer is $\boxed{18}$. I hope it is correct.", "18"),
    (r"\boxed{\frac{1}{2}}", "1/2"),
    (r"\dfrac{6}{8}", "3/4"),
    (r"\boxed{1{,}000}", "1000"),
    (r"\boxed{\text{18 dollars}}", "18"),
    (r"\$18", "18"),
    (r"18^\circ", "18"),
    (r"\[ x = 7 \]", "7"),
    (r"5 \times 10^3", "5000"),
    (r"The total is \(3 \times 4 = 12\).", "12"),
    ("10^3", "1000"),
    ("2x+3", "3+2x"),
    ("x = 5", "5"),
    # in running text
    ("She has 3 and buys 4.\nSo 3 + 4 = 7\n#### 7", "7"),
    ("so he pays 3 * 6 = 18 dollars", "18"),
    ("The total is $64.\nHope this helps!", "64"),
    ("The answer is 18 dollars, which is 2 per day.", "18"),
    ("18 is 3 times 6.\nAnswer: 18", "18"),
    ("The answer is:\n24", "24"),
    ("3 out of 4, so the answer is 3/4", "0.75"),
    # the last stated answer counts, a tag wins
    ("The answer is 5. No wait, the answer is 6.", "6"),
    ("I think 5.\n<answer>6</answer> (not 7)", "6"),
    ("<reasoning>\n1 + 5\n</reasoning>\n<answer>\n6\n</answer>\n", "6"),
    # words
    ("Yes.", "yes"),
    ("**Paris**", "Paris"),
    ("The answer is: Paris.", "paris"),
    (r"\text{Yes}", "yes"),
    ("3:30", "3:30"),
    # Markdown
    ("So it is **18**.", "18"),
    ("Therefore, she makes **$18** every day.", "18"),
    ("**18** apples for 3 children", "18"),
    ("The total is *18* apples", "18"),
    ("It comes to __18__.", "18"),
    ("**Answer:** 42", "42"),
    ("**Answer**: 42", "42"),
    ("The answer is **42**.", "42"),
    ("**Final Answer**\n\n42", "42"),
    ("**The answer is 42.**", "42"),
    ("### Answer\n42", "42"),
    ("#### **$18** a day", "18"),
    ("#### `18`", "18"),
    ("~~17~~ 18", "18"),
    ("```\n18\n```", "18"),
    ("The answer is **Paris**.", "Paris"),
    ("The capital is **Paris**", "Paris"),
    ("**-6*x**8 + 3*x**6 + C**", "-6*x**8 + 3*x**6 + C"),
    # headings and what follows the sign
    ("#### Final Answer\n\n18", "18"),
    ("So \\boxed{18}.\n\n#### Check\nIt fits.", "18"),
    ("#### Step 1: count\n9 + 9\n#### Step 2\nIt is 18", "18"),
    ("#### 18\n\nQuestion: Tom has 5 apples", "18"),
    ("####18", "18"),
    ("#### Paris", "Paris"),
    ("Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.", "\\frac{1}{2}"),
    ("Final Answer: The final answer is $(3,4)$. I hope it is correct.", "(3,4)"),
    ("Final Answer: The final answer is Paris. I hope it is correct.", "Paris"),
    ("Final Answer: The final answer is $\\text{even}$. I hope it is correct.", "\\text{even}"),
    ("The answer is \\boxed{12}. The answer is reasonable.", "12"),
    ("18 since 3 * 6 = 18, and 7 is odd", "18"),
    ("5 because 2+3=5, and 7 is odd", "5"),
    ("答案是 18", "18"),
    ("答案是5。", "5"),
    ("It is 18.<|im_end|>\n<|im_start|>user\nAnd 5?", "18"),
    # text
    ("The answer is KIND, Nathaniel, Revenue", "KIND, Nathaniel, Revenue"),
    ("The answer is Lily is an egoist, and Logan is an altruist.", "Lily is an egoist, and Logan is an altruist."),
    ("The answer is CONTACT US AS SOON", "CONTACT US AS SOON"),
    ("The answer is do so which is why.", "do so which is why"),
    ("The answer is Paris, which is in France.", "Paris"),
    ("The answer is Paris because it is the capital.", "Paris"),
    ("<answer>1 2\n3 4</answer>", "1 2\n3 4"),
    ("1 2\n3 4", "1 2\n3 4"),
    ("The answer is\n1 2\n3 4", "1 2\n3 4"),
    ("\\boxed{1 2\n3 4}", "1 2\n3 4"),
    ("#### 1 2\n3 4", "1 2\n3 4"),
    ("The grid:\n1 2\n3 4", "1 2\n3 4"),
    ("Yes, it is.", "yes"),
    ("True", "true"),
    ("No, because it is too short.", "No"),
    ("The answer is 12:30", "12:30"),
    ("0x12FB0D18", "0x12fb0d18"),
    # thinking
    ("<think>maybe the answer is 4.</think>\n5", "5"),
    ("<think>\\boxed{4}? No.</think>\nIt is 5.", "5"),
    ("I think \\boxed{4}.</think>5", "5"),
    ("<think>a</think>4<think>b</think>5", "5"),
    ("<thinking>the answer is 3</thinking><answer>\\boxed{18}</answer>", "18"),
    ("[THINK]4[/THINK]5", "5"),
    ("<reasoning>\n4 or 5\n<answer>\n5\n</answer>", "5"),
    # choices
    ("(B)", "B"),
    ("B.", "B"),
    ("The answer is (B)", "B"),
    ("The answer is (B) because A is wrong", "B"),
    ("The answer is B, not A.", "B"),
    ("B. Paris", "B"),
    ("B) Paris", "B"),
    ("The correct option is (B).", "B"),
    ("Option B", "B"),
    ("\\boxed{\\text{(B)}}", "B"),
    ("\\boxed{B}", "\\text{(B)}"),
    ("B", "(B)"),
    ("(B) Paris", "Paris"),
    ("(B)", "B. Paris"),
    ("The answer is A) 5", "A"),
    # numbers
    ("3,14", "3.14"),
    ("1.234,50 €", "1234.5"),
    ("0,5", "1/2"),
    ("1.234.567", "1234567"),
    ("1 000", "1000"),
    ("1\u202f000\u202f000", "1000000"),
    ("1'000", "1000"),
    ("\\boxed{10,\\!080}", "10080"),
    ("\\boxed{10080}", "10,\\!080"),
    ("\\boxed{10\\,080}", "10080"),
    ("\\boxed{1\\ 000\\ 000}", "1000000"),
    ("\\boxed{\\$10{,}080}", "\\$10,\\!080"),
    ("½", "0.5"),
    ("2½", "2.5"),
    ("\\boxed{\\frac12}", "0.5"),
    ("\\boxed{\\dfrac72}", "7/2"),
    ("\\boxed{3\\frac{1}{2}}", "3.5"),
    ("\\boxed{-\\frac72}", "-3.5"),
    ("\\boxed{\\frac{-7}{2}}", "-\\frac72"),
    ("２５", "25"),
    ("5\u200b", "5"),
    ("–5", "-5"),
    ("minus five", "-5"),
    ("twenty-one", "21"),
    ("one hundred and five dollars", "105"),
    ("two thirds", "2/3"),
    ("$1.5 million", "1500000"),
    ("US$5", "5"),
    ("Rs. 500", "500"),
    ("5km", "5"),
    ("5\\text{ cm}^2", "5"),
    ("\\boxed{5^{\\circ}\\text{C}}", "5"),
    ("8.5 x 10^-3", "0.0085"),
    ("10/3 ≈ 3.33", "10/3"),
    ("\\boxed{50}\\%", "\\frac12"),
    ("1500 (1.5 x 10^3)", "1500"),
    ("$x\\approx 11$", "11"),
    ("$x \\neq 3$", "x != 3"),
    ("\\boxed{7:32}", "S_{1}:S_{2} = 7:32"),
    ("So the answer is $\\frac{3}{4}$, or 0.75.", "3/4"),
    ("9.8000000000000007", "9.8"),
    ("The answer is 18 dollars for 3 days", "18"),
    # lists, sets, tuples, intervals
    ("\\boxed{1, 2}", "1,2"),
    ("\\boxed{2, 1}", "1,2"),
    ("\\boxed{1 \\text{ and } 2}", "1,2"),
    ("\\boxed{1} and \\boxed{2}", "1,2"),
    ("$x = \\boxed{2}$ or $x = \\boxed{1}$", "1,2"),
    ("x = 1 or x = 2", "1, 2"),
    ("\\boxed{\\{2,1\\}}", "\\{1,2\\}"),
    ("\\boxed{1 \\pm \\sqrt{2}}", "1-\\sqrt2, 1+\\sqrt2"),
    ("\\boxed{(3, \\frac{2}{4})}", "(3,0.5)"),
    ("\\boxed{x \\in [-2,7]}", "[-2,7]"),
    ("-2 \\le x \\le 7", "[-2,7]"),
    ("\\boxed{(-\\infty, 2) \\cup (3, 4]}", "(3,4]\\cup(-\\infty,2)"),
    (
        "\\boxed{\\begin{bmatrix}1&2\\\\3&\\frac{1}{2}\\end{bmatrix}}",
        "\\begin{pmatrix} 1 & 2 \\\\ 3 & 0.5 \\end{pmatrix}",
    ),
    # algebra
    ("The answer is (x+1)(x-1)", "x^2-1"),
    ("2*x**3 + 1", "1 + 2*x**3"),
    ("\\boxed{y = 2x + 3}", "2x+3"),
    ("\\boxed{2x+3}", "y=2x+3"),
    ("2x + 4y = 6", "x + 2y = 3"),
    ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}"),
    ("\\boxed{\\pi/2}", "\\frac{\\pi}{2}"),
    ("4i+3", "3+4i"),
    ("\\frac{x^3-1}{x-1}", "x^2+x+1"),
    ("\\sin^2 x + \\cos^2 x + y", "1+y"),
    ("\\sqrt{17}", "4.123105625617661"),
]
WRONG = [
    ("7", "72"),
    ("72", "7"),
    ("1.5", "15"),
    ("15", "1.5"),
    ("-3", "3"),
    ("3", "-3"),
    ("1.0001", "1"),
    ("0.33", "1/3"),
    ("5000%", "50%"),
    ("0.5", "50"),
    ("1,5", "5"),
    ("1,5", "15"),
    ("100", "1e3"),
    ("seven", "8"),
    ("1/0", "1"),
    ("", "5"),
    ("   ", "5"),
    ("5", ""),
    ("I don't know", "5"),
    ("The answer is not 18.", "18"),
    ("the answer is 6. no, the answer is 5.", "6"),
    ("<answer>7</answer> 6", "6"),
    ("<answer></answer> 6", "6"),
    ("18 19", "18"),
    ("5+2", "2"),
    ("10-3", "3"),
    ("7 + x", "7"),
    # sums left to the reader: the question's echo is no answer
    ("7 - 2", "5"),
    ("7 + 9 - 0 = 7 + 9 - 0", "16"),
    ("12/2", "6"),
    (r"\frac{12}{2}", "6"),
    (r"3 \times 4", "12"),
    (r"\boxed{3 \cdot 4}", "12"),
    (r"$\sqrt{4}$", "2"),
    ("2^{3}", "8"),
    ("1 - 1/2", "1/2"),
    ("5 m^2", "2"),
    ("2x+3", "3x+2"),
    (r"\frac{1}{3}", "0.5"),
    ("3:45", "3:30"),
    ("3:45", "3"),
    ("2020-01-05", "2020-02-04"),
    ("1 2 4", "1 2 3"),
    ("north-east", "east-north"),
    ("no", "yes"),
    ("Yes and no", "yes"),
    # several answers, none, or another's
    ("The answer is 5 or 6 or 7", "7"),
    ("The answer is 5 or 6 or 7", "5"),
    ("5, 6, 7", "7"),
    ("either 5 or 7", "7"),
    ("5 to 7", "7"),
    ("between 5 and 7", "7"),
    ("5/6/7", "7"),
    ("5 apples and 7 pears", "7"),
    ("I don't know whether it is 18 or 19", "19"),
    ("\\boxed{5} or \\boxed{7}", "7"),
    ("\\boxed{5}\n\\boxed{7}", "7"),
    ("The answer is 5. Or 6.", "5"),
    ("<answer>5 or 7</answer>", "7"),
    ("It is not 18.", "18"),
    ("It isn't 18", "18"),
    ("The answer is 20, not 18.", "18"),
    ("x > 5", "5"),
    ("\\boxed{x \\ge 5}", "5"),
    ("\\boxed{\\pm 5}", "5"),
    ("Paris or London", "Paris"),
    ("The answer is not Paris.", "Paris"),
    ("**Paris** or **London**", "Paris"),
    ("Yes, or no", "yes"),
    ("```python\nprint(5)\n```", "5"),
    ("18\n~~18~~ 17", "18"),
    # thinking
    ("<think>\\boxed{5} wait, no", "5"),
    ("<think>answer is 5, let me check", "5"),
    ("<think>5", "5"),
    ("<think>\\boxed{5}</think>\nIt is 6.", "5"),
    ("<think>\\boxed{5}</think>", "5"),
    ("<think>a</think> 5 <think>b", "5"),
    ("<think><answer>5</answer>", "5"),
    ("<thinking>it is 5", "5"),
    # choices
    ("A or B", "B"),
    ("(A), (B)", "A"),
    ("(A) (B) (C)", "A"),
    ("A. Paris B. London", "A"),
    ("The answer is a dog", "A"),
    ("The answer is (A) because B is wrong", "B"),
    ("B. London", "B. Paris"),
    ("Because", "B"),
    ("(A) is incorrect since it is too big. So it is (C).", "A"),
    ("(A) is too big, so (C)", "A"),
    ("A. Paris is not it.\nSo it is (C).", "A"),
    ("18 more than 5", "18"),
    # names and codes are no products
    ("The answer is H2O", "2"),
    ("The answer is route K2", "2"),
    ("The answer is B2.", "2"),
    ("x_2", "2"),
    ("The answer is 0x12fb0d18", "-0x55f2"),
    ("The answer is 0", "-0x55f2"),
    ("5x", "5"),
    ("\\boxed{3s}", "3"),
    ("f(5)", "5"),
    ("x+6", "6"),
    ("1011_2", "1011"),
    ("\\frac{1+\\sqrt{5}}{2}", "2"),
    ("\\begin{pmatrix} -2 \\\\ 1 \\end{pmatrix}", "1"),
    ("(-\\infty,0]", "0"),
    # powers, tolerance, letters
    ("The answer is 2*x**3", "2*x**2"),
    ("The answer is -6*x**8 + 3*x**6 + 3*x**4 + C", "-X**5/2 + 15*X**3/2 + 3*X**2 + C"),
    ("The answer is 10*x**7 + 4*x**3/5 + C", "-7*x**10 + 5*x**6 + 5*x**4 + 4*x/3 + C"),
    ("x^12", "x^1*2"),
    ("The answer is 0", "3.7500582440407246e-17"),
    ("The answer is 1e-25", "9e-22"),
    ("0", "1/3000000"),
    ("The answer is C", "2*x + C"),
    ("The answer is x", "2*x + C"),
    ("The answer is a", "b"),
    ("The answer is $f(y)$", "$f(x)$"),
    ("|x|", "x"),
    ("1000000000000001", "1000000000000000"),
    ("2*3", "23"),
    (".5", "5"),
    ("5 million", "5"),
    ("18 euros", "18 dollars"),
    ("5 cm", "5 m"),
    ("1,234", "1.234"),
    # what a sum is worth is no way to write it
    ("The answer is 122", "79 - 17 + 60"),
    ("\\boxed{42}", "2 \\times 3 \\times 7"),
    # order counts
    ("\\boxed{(2,1)}", "(1,2)"),
    ("\\boxed{[1,2)}", "(1,2]"),
    ("\\boxed{1,2,3}", "1,2"),
    ("b, a", "a, b"),
    ("kind, Revenue, Nathaniel", "kind, Nathaniel, Revenue"),
    ("y = 5", "x = 5"),
    ("x > 2", "x < 2"),
    ("x + 2y = 4", "x + 2y = 3"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}"),
]


# More of each kind, in the order of those above.
MORE_RIGHT = [
    ("The final answer is \\(\\boxed{18}\\).", "18"), ("Answer: $18", "18"), ("ANSWER: 18", "18"),
    ("answer = 18", "18"), ("The answer is: 18 km.", "18"), ("The answer is approximately 18.", "18"),
    ("The answer is about $18.", "18"), ("The correct answer is B", "B"), ("The correct answer is (B) 42.", "B"),
    ("Answer: B", "B"), ("Answer: (C) Paris", "C"), ("**B**", "B"), ("**B.** Paris", "B"), ("**(B) Paris**", "B"),
    ("The answer is **B**.", "B"), ("The answer is **B) Paris**.", "B"), ("b", "B"), ("(b)", "B"), ("B: Paris", "B"),
    ("[B]", "B"), ("$B$", "B"), ("$\\boxed{\\text{B}}$", "B"), ("\\boxed{B. 42}", "B"), ("<answer>B</answer>", "B"),
    ("<answer>(B)</answer>", "(B)"), ("The answer is option B.", "B"), ("I choose (B).", "B"),
    ("So the correct choice is C.", "C"), ("Therefore, option (D) is correct.", "D"), ("#### B", "B"),
    ("The answer is B: Paris", "B"), ("Choice B", "B"), ("The answer is yes", "Yes"), ("Yes", "yes"),
    ("**Yes**", "yes"), ("<answer>No.</answer>", "no"), ("The statement is true. Answer: True", "True"),
    ("The answer is No, since 3 > 2.", "no"), ("It's 5.", "5"), ("=5", "5"), ("= 5", "5"), ("x=5", "5"),
    ("$x = 5$", "5"), ("$$5$$", "5"), ("\\[5\\]", "5"), ("\\(5\\)", "5"), ("5.", "5"), ("'5'", "5"), ("\"5\"", "5"),
    ("`5`", "5"), ("5;", "5"), ("5,", "5"), ("(5).", "5"), ("[5]", "5"), ("{5}", "5"), ("5 (five)", "5"),
    ("five (5)", "5"), ("$5 million", "5000000"), ("5.0", "5"), ("5.00", "5"), ("05", "5"), ("5e0", "5"),
    ("5.", "5.0"), ("50 %", "50%"), ("50\\%", "50%"), ("fifty percent", "50%"), ("50 percent", "50%"), ("1/2", "50%"),
    ("50%", "1/2"), ("-0.5", "-1/2"), ("−½", "-0.5"), ("-\\frac12", "-0.5"), ("- 1/2", "-0.5"),
    ("\\frac{-1}{2}", "-0.5"), ("\\frac{1}{-2}", "-0.5"), ("1 1/2", "1.5"), ("1½", "1.5"), ("1 ½", "1.5"),
    ("12,345.67", "12345.67"), ("12 345,67", "12345.67"), ("12.345,67", "12345.67"), ("1 234 567", "1234567"),
    ("1,234,567.", "1234567"), ("1\u00a0234", "1234"), ("1\u2009234", "1234"), ("1’234", "1234"),
    ("$1,234.50", "1234.5"), ("1.234.567,89", "1234567.89"), ("5 meters", "5"), ("5 m", "5"), ("5m", "5"),
    ("5 kg", "5"), ("5kg", "5"), ("5 km/h", "5"), ("5 cm²", "5"), ("5 cm^2", "5"), ("5 square meters", "5"),
    ("5°", "5"), ("5 °C", "5"), ("5 degrees", "5"), ("5 dollars", "$5"), ("€5", "5 euros"), ("5 USD", "$5"),
    ("£5.00", "5"), ("5 hours", "5 hours"), ("5 h", "5 hours"), ("5 hours", "5 h"), ("60 mph", "60"), ("5th", "5"),
    ("{1, 2}", "{2, 1}"), ("1 and 2", "1, 2"), ("$\\{1,2\\}$", "1,2"), ("1; 2", "1,2"), ("x=1, y=2", "x=1,y=2"),
    ("y=2, x=1", "x=1,y=2"), ("(1, 2)", "(1,2)"), ("$(1,2)$", "(1, 2)"), ("\\left(1, \\frac12\\right)", "(1,0.5)"),
    ("[1, 2]", "[1,2]"), ("\\boxed{[1, 2, 3]}", "[1,2,3]"), ("1, 2, and 3", "1,2,3"),
    ("\\boxed{x = 1 \\text{ or } x = 2}", "1,2"), ("x = 1, 2", "1,2"), ("-1,1", "\\pm 1"), ("\\pm 1", "-1, 1"),
    ("['a', 'b']", "[\"a\", \"b\"]"), ("[[1, 2], [3, 4]]", "[[1,2],[3,4]]"), ("apple, banana", "apple,banana"),
    ("x^2 + 2x + 1", "(x+1)^2"), ("x**2 + 2*x + 1", "(x+1)**2"), ("3*x^2", "3x^2"), ("2xy", "2yx"),
    ("\\frac{x}{2}", "x/2"), ("e^x", "e^{x}"), ("2\\sin x\\cos x", "\\sin 2x"), ("\\ln 4", "2\\ln 2"),
    ("\\sqrt[3]{8}x", "2x"), ("1/x", "x^{-1}"), ("\\frac{\\sqrt2}{2}", "\\frac{1}{\\sqrt2}"), ("y = x + 1", "y=1+x"),
    ("x < 3", "x<3"), ("x \\in (-\\infty, 3)", "x<3"), ("3 > x", "x < 3"), ("2 < x < 3", "(2,3)"), ("(2,3)", "2<x<3"),
    ("x \\geq 3", "[3, \\infty)"), ("10^{100}", "10^{100}"), ("2^{10}", "2^{10}"),
    ("\\frac{2}{3}\\pi", "\\frac{2\\pi}{3}"), ("120π", "120\\pi"), ("√2", "\\sqrt{2}"), ("2√3", "2\\sqrt{3}"),
    ("x² + 1", "x^2+1"), ("-3.5*x**4/2 + C", "-1.75*x**4 + C"), ("New York", "new york"),
    ("The answer is New York City.", "New York City"), ("\"Paris\"", "Paris"), ("Paris.", "Paris"),
    ("the Paris", "Paris"), ("Answer: Paris (France)", "Paris (France)"),
    ("It is called Paris.\nAnswer: Paris", "Paris"), ("Dr. Smith", "Dr. Smith"),
    ("The answer is Dr. Smith.", "Dr. Smith"), ("The answer is 3 a.m.", "3 a.m."),
    ("Answer: St. John's, Newfoundland", "St. John's, Newfoundland"),
    ("The answer is mother-in-law.", "mother-in-law"), ("The answer is one, two, three", "one, two, three"),
    ("The answer is to be or not to be", "to be or not to be"), ("The answer is not applicable", "not applicable"),
    ("not applicable", "not applicable"), ("<think>x</think>\n\nThe answer is Paris.", "Paris"),
    ("<think>\n\n</think>\n\n18", "18"), ("<think>18</think>The answer is $\\boxed{18}$", "18"),
    ("thinking... done.\n18", "18"), ("Let me check: \\boxed{17}? No. \\boxed{18}", "18"),
    ("First \\boxed{3}, so the total is \\boxed{18}", "18"), ("Thus x=\\boxed{3} and y=\\boxed{4}", "x=3,y=4"),
    ("18\n", "18"), ("\n\n18\n\n", "18"), ("The total is 18 dollars ($18).", "18"), ("He has 18 left!", "18"),
    ("Total = 12 + 6 = 18", "18"), ("12 + 6 = **18**", "18"), ("$12 + $6 = $18", "18"),
    ("12 + 6 = 18 apples and he is happy", "18"), ("So, 3 × 6 = 18.", "18"), ("3*6=18", "18"),
    ("The answer is 3*6=18.", "18"), ("The answer is 18 (3*6).", "18"), ("The answer is 18, not 17.", "18"),
    ("The answer is 18 and not 17", "18"), ("The answer is 18 instead of 17.", "18"), ("The answer is 18", "18"),
    ("1 hour and 30 minutes", "1 hour and 30 minutes"), ("2:30 PM", "2:30 PM"), ("2:30 pm", "2:30 PM"),
    ("January 5, 2020", "January 5, 2020"), ("2020-01-05", "2020-01-05"), ("5 - 3 = 2", "2"), ("-5 + 3 = -2", "-2"),
    ("= -2", "-2"), ("is -2.", "-2"), ("equals −2", "-2"), ("minus 2", "-2"), ("negative two", "-2"),
    ("11/4", "2.75"), ("2 3/4", "11/4"), ("2\\frac34", "11/4"), ("2.75", "11/4"), ("1000000", "10^6"),
    ("10^6", "1000000"), ("1e6", "1000000"), ("1 × 10⁶", "1000000"), ("1.2×10^{-3}", "0.0012"),
    ("6.02e23", "6.02 \\times 10^{23}"), ("**Final Answer:** 18", "18"), ("**Final Answer: 18**", "18"),
    ("### Final Answer: 18", "18"), ("## Answer: **18**", "18"), ("Final answer: **$18**", "18"), ("__18__", "18"),
    ("_18_", "18"), ("***18***", "18"), ("* 18", "18"), ("→ 18", "18"), ("∴ 18", "18"), ("Answer → 18", "18"),
    ("Answer: 18 ✅", "18"), ("🎉 18 🎉", "18"),
    ("5 and a half", "5.5"), ("5 and a half hours", "5.5"), ("The answer is 2 and three quarters.", "2.75"),
    ("18 more", "18"), ("18 times", "18"), ("5 percent", "5"), ("half", "0.5"), ("one and a half", "1.5"),
    ("It takes 5 and a half hours.", "5.5"), ("18 apples in total", "18"), ("18 per day", "18"),
    ("18 dollars a day", "18"), ("There are 18 students in the class", "18"), ("The answer is 3/4 (0.75).", "3/4"),
    ("Step by step.\n\n1. Eggs: 16\n2. Minus 3 - 4 = 9\n3. 9 × $2 = $18\n\n**Janet makes $18 per day.**", "18"),
    ("To find the total:\n- Apples: 5\n- Pears: 13\n\nTotal: 5 + 13 = **18 fruits**.", "18"),
    ("### Solution\n\nStep 1. ...\n\n### Final Answer\n\n**$18**", "18"),
    ("We have:\n\\[ x = \\frac{36}{2} = 18 \\]\n\nSo, the answer is \\( x = 18 \\).", "18"),
    ("Therefore, Janet makes **$18** every day at the farmers' market.\n\n\\[\n\\boxed{18}\n\\]", "18"),
    ("<think>\nOkay... 16-3-4=9, 9*2=18.\n</think>\n\nJanet makes $18 a day.\n\n**Answer:** $\\boxed{18}$", "18"),
    ("The capital of France is **Paris**.\n\nFinal answer: Paris", "Paris"),
    ("I'd go with option (C), since water boils at 100 °C.\n\nAnswer: (C)", "C"), ("Answer: C. 100 °C", "C"),
    ("The answer is C: 100 °C.", "C"), ("The correct answer is: **C) 100 °C**", "C"), ("**Correct answer: C**", "C"),
    ("Answer:\n\n(C)", "C"), ("Answer: **(C)**", "C"), ("The best answer is B.", "B"), ("The answer is (b).", "B"),
    ("Answer: x = 2, y = 3", "x=2, y=3"), ("$$x^2+1$$", "x^2+1"), ("The derivative is $2x$.", "2x"),
    ("f'(x) = 2x", "2x"), ("f(x) = x^2 + 1", "x^2+1"), ("Thus $f(x)=x^2+1$.", "x^2+1"),
    ("The solution set is {1, 2}.", "{1,2}"), ("The solutions are x = 1 and x = 2.", "1,2"),
    ("The roots are 1 and 2.", "1, 2"), ("ANSWER: 42", "42"), ("Ans: 42", "42"), ("Answer: 42 (forty-two)", "42"),
    ("42 (forty-two)", "42"), ("Answer: 42.\n\nLet me know if you need anything else!", "42"),
    ("Answer: 42\n\nExplanation: 6 * 7 = 42.", "42"), ("Answer: 42\n\nIn step 1 we used 7.", "42"),
    ("The answer is 42.\n\nVerification: 6 * 7 = 42, as 6 = 2 * 3.", "42"), ("The answer is: True", "True"),
    ("False.", "False"), ("Réponse : 42", "42"), ("La réponse est 42.", "42"), ("Die Antwort ist 42.", "42"),
    ("Ответ: 42", "42"), ("答えは42です。", "42"), ("答案：42", "42"), ("정답은 42입니다.", "42"),
    ("The answer is 1,234,567 people.", "1234567"), ("It weighs 1.5 kg", "1.5 kg"), ("1.5 kg", "1.5"),
    ("$3.50", "3.5"), ("3.50 dollars", "$3.50"), ("350 cents", "350 cents"), ("一共18个", "18"), ("答案是18。", "18"),
    ("The capital is Paris.", "Paris"),
    ("\\fbox{18}", "18"), ("So $\\boxed 5$.", "5"), ("\\boxed -3", "-3"), ("Answer - 42", "42"), ("Answer — 42", "42"),
    ('{"answer": 18}', "18"), ('{"reasoning": "9 * 2", "answer": "18 dollars"}', "18"),
    ('{"answer": "Paris"}', "Paris"),
    ('```json\n{"work": "17 + 1 = 18",\n "final_answer": 18}\n```', "18"),
    ('{"answer": "the \\"Ritz\\""}', "the Ritz"), ('{"answer": [1, 2]}', "[1, 2]"),
]  # fmt: skip
MORE_WRONG = [
    ("The answer is 5 and 6", "6"), ("5,6", "6"), ("5;6", "6"), ("5|6", "6"), ("5 & 6", "6"), ("5 vs 6", "6"),
    ("5~6", "6"), ("5-6", "6"), ("5…6", "6"), ("5 6", "6"), ("maybe 5, maybe 6", "6"), ("either 5 or 6", "5"),
    ("It could be 5, 6 or 7", "7"), ("5 (or 6)", "5"), ("5 / 6", "6"), ("\\boxed{5,6}", "6"),
    ("\\boxed{5 \\text{ or } 6}", "6"), ("<answer>5, 6</answer>", "6"), ("#### 5 or 6", "6"), ("#### 5, 6", "6"),
    ("**5** or **6**", "6"), ("**5**, **6**", "6"), ("A: 5, B: 6", "6"), ("5 or six", "5"), ("one or two", "2"),
    ("one or two", "1"), ("seven or 8", "8"), ("1 to 10", "10"), ("1..10", "10"), ("1–10", "10"),
    ("from 1 to 10", "10"), ("between 1 and 10", "10"), ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10", "10"),
    ("at most 5 or 6", "6"), ("5 or -5", "5"), ("±5", "5"), ("+/-5", "5"), ("\\pm5", "5"), ("5 ± 1", "5"),
    ("5 +- 1", "5"), ("> 5", "6"), (">5", "5"), ("< 5", "5"), ("≤5", "5"), ("≥ 5", "5"), ("≠ 5", "5"),
    ("x != 5", "5"), ("!= 5", "5"), ("not equal to 5", "5"), ("never 5", "5"), ("anything but 5", "5"),
    ("No number", "5"), ("unknown", "5"), ("5?? or 6??", "5"), ("B or C", "B"), ("B, C", "B"), ("B and C", "C"),
    ("B/C", "B"), ("(B) or (C)", "B"), ("(B) (C)", "C"), ("A B C D", "B"), ("ABCD", "B"), ("A, B, C or D", "D"),
    ("not B", "B"), ("The answer is not B", "B"), ("It isn't (B)", "B"), ("All of the above", "A"),
    ("\\boxed{A, B}", "A"), ("A. B. C. D.", "A"), ("C", "B"), ("(C)", "B"), ("Bob", "B"), ("be", "B"), ("B2", "B"),
    ("The answer is Because", "B"), ("The answer is A, B", "A"), ("yes and no", "no"), ("yes or no", "yes"),
    ("no yes", "no"), ("maybe", "yes"), ("not yes", "yes"), ("Yes? No.", "yes"), ("Yes, no", "yes"),
    ("True or False", "True"), ("not true", "true"), ("No, it's true", "true"), ("nope", "no"), ("1.000", "1000"),
    ("1000", "1.000"), ("0.1", "0.01"), ("1e3", "1e4"), ("1e-3", "1e3"), ("10^3", "10^-3"), ("5%", "5000"),
    ("0.05", "5"), ("5", "0.05"), ("50", "0.5"), ("2 1/2", "21/2"), ("21/2", "2 1/2"), ("1/2", "2/1"),
    ("-1/2", "1/2"), ("1/-2", "1/2"), ("5 thousand", "5"), ("5k", "5"), ("$5M", "5"), ("5 hundred", "5"), ("6", "5"),
    ("five hundred", "5"), ("five hundred", "500000"), ("twenty five", "20"), ("twenty five", "5"),
    ("one third", "3"), ("half", "2"), ("5 billion", "5000000"), ("-5", "5"), ("5", "-5"), ("(-5)", "5"), ("−5", "5"),
    ("minus 5", "5"), ("negative 5", "5"), ("5 below zero", "-6"), ("x=5", "y=5"), ("x5", "5"), ("5^x", "5"),
    ("5a", "5"), ("x_5", "5"), ("5_x", "5"), ("log 5", "5"), ("\\log 5", "5"), ("\\sqrt5", "5"), ("\\sqrt{5}", "5"),
    ("5\\sqrt2", "5"), ("5\\pi", "5"), ("5π", "5"), ("5i", "5"), ("5e", "5"), ("5!", "120"), ("sin(5)", "5"),
    ("|5|", "-5"), ("5^2", "5"), ("5^2", "2"), ("5²", "5"), ("24", "5^2"), ("2^5", "5"), ("5 mod 3", "3"),
    ("5 choose 3", "3"), ("\\binom{5}{3}", "3"), ("5:3", "3"), ("5:30", "30"), ("12/25/2020", "2020"),
    ("v1.5", "1.5"), ("1.2.3", "1.2"), ("3D", "3"), ("R2D2", "2"), ("COVID-19", "19"), ("A4", "4"), ("0b101", "101"),
    ("0xff", "0xfe"), ("#5", "6"), ("(1,2)", "(2,1)"), ("[1,2]", "(1,2)"), ("(1,2)", "[1,2]"), ("{1,2}", "(1,2)"),
    ("1,2", "1,2,3"), ("1,2,3", "1,2"), ("1,1,2", "1,2,2"), ("[1,2]", "[2,1]"), ("1,2", "12"), ("12", "1,2"),
    ("1 2", "12"), ("(1,2),(3,4)", "(1,3),(2,4)"), ("x=1,y=2", "x=2,y=1"), ("a, b, c", "a, c, b"),
    ("apple, banana", "banana, apple"), ("[1, 2) ", "[1,2]"), ("(-\\infty,2]", "(-\\infty,2)"), ("x\\ge2", "x>2"),
    ("x>2", "x<2"), ("2<x<3", "2<x\\le3"), ("x^2", "x^3"), ("2x", "x^2"), ("x+1", "x-1"), ("-x", "x"), ("x/y", "y/x"),
    ("x^{2y}", "x^2y"), ("sin x", "cos x"), ("\\sin x", "\\cos x"), ("\\sin x", "\\sin y"), ("f(x+1)", "f(x)+1"),
    ("f(2x)", "2f(x)"), ("\\ln x", "\\log_{10} x"), ("e^x", "x^e"), ("x^2 + C", "x^2"), ("x^2", "x^2 + C"),
    ("\\frac{1}{2}x", "\\frac{1}{2x}"), ("(x+1)^2", "x^2+1"), ("\\sqrt{x+1}", "\\sqrt{x}+1"), ("2**x", "x**2"),
    ("2*x**2", "2*x*2"), ("x**10", "x**1*10"), ("x*y", "x+y"), ("3.1415", "\\pi"), ("3.14", "\\pi"), ("22/7", "\\pi"),
    ("1.41", "\\sqrt2"), ("y=2x", "y=3x"), ("y=2x", "x=2y"), ("x+y=1", "x+y=2"), ("0", "x-x+1"),
    ("\\infty", "-\\infty"), ("1", "\\infty"), ("i", "-i"), ("3+4i", "3-4i"), ("3+4i", "4+3i"),
    ("Paris, London", "Paris"), ("Paris and London", "London"), ("Paris/London", "Paris"), ("London", "Paris"),
    ("Par is", "Paris"), ("Parisian", "Paris"), ("not Paris", "Paris"), ("no Paris", "Paris"),
    ("Paris?? London", "Paris"), ("Either Paris or London", "London"), ("Paris. Or London.", "Paris"),
    ("1 2 3", "1 3 2"), ("1 2\n3 4", "1 2\n4 3"), ("1 2 3 4", "1 2\n3 4"), ("abc", "ab c"), ("", ""), ("", "Paris"),
    (" ", "5"), ("5", " "), ("a b", "b a"), ("<think>5</think>", "5"), ("<think>The answer is 5.", "5"),
    ("<Think>5", "5"), ("<THINK>\\boxed{5}", "5"), ("<think>a</think><think>5", "5"), ("<reasoning>\\boxed{5}", "5"),
    ("<thought>5</thought>6", "5"), ("[THINK]5", "5"), ("<|begin_of_thought|>5", "5"), ("◁think▷5", "5"),
    ("#### 18\n#### 19", "18"), ("The answer is 18. The answer is 19.", "18"), ("\\boxed{18}\\boxed{19}", "19"),
    ("18\n\n19", "18"), ("```\nx = 18\n```\nThe result is 19.", "18"), ("18 ~~19~~", "19"),
    ("The answer is 19. I first thought 18.", "18"), ("\\boxed{-5}", "- 5 x^{5} - x"),
    ("The answer is -5", "- 5 x^{5} - x"), ("E=1,F=2", "A=1,B=2"), ("3\n0\n0", "0"), ("1 2\n3 4\n5 6", "3 4\n5 6"),
    ("3x^2 - 7x + 4", "4"), ("5x - 7y + 4 = 0", "0"), ("7(x+3)(x-3)", "7"), ("(10, 0), (0,0)", "0"), ("(-a,0)", "0"),
    ("6\\pi+2", "2"), ("\\frac{\\sqrt6}3", "3"), ("3s^2", "3"), ("$\\left(\\frac{17}{4},0\\right)$", "4"),
    ("5 or more", "5"), ("5 and a half", "5"), ("5 or so", "5"), ("half of 10", "10"), ("50% of 10", "10"),
    ("twice 9", "9"), ("the square root of 25", "25"), ("5 squared", "5"), ("the sum of 5 and 6", "6"),
    ("5 to 6 apples", "6"), ("The answer is Paris (or London)", "Paris"), ("5 and a third", "5"),
    ("20 percent of 5", "5"), ("3 out of 5", "5"), ("3 of 5", "5"), ("one of 5", "5"), ("5 factorial", "5"),
    ("log of 5", "5"), ("5 choose 2", "5"), ("\\boxed{5} \\boxed{6}", "5"), ("\\boxed{\\frac{5}{6}}", "5"),
    ("\\boxed{5x+6}", "6"), ("\\boxed{x^5}", "5"), ("\\boxed{5^6}", "5"), ("\\boxed{5 \\mod 6}", "5"),
    ("\\boxed{5!}", "5"), ("\\boxed{5_6}", "5"), ("\\boxed{\\{5\\}}", "6"), ("\\boxed{5+6i}", "5"),
    ("\\boxed{5\\%}", "5000"), ("\\boxed{\\text{5 or 6}}", "5"), ("\\boxed{5\\text{ or }6}", "6"),
    ("\\boxed{5/6}", "6"), ("\\boxed{5:6}", "6"), ("\\boxed{(5)}", "6"), ("\\boxed{5\\sqrt{6}}", "5"),
    ("\\boxed{\\sqrt{5}}", "5"), ("\\boxed{-\\sqrt{5}}", "5"), ("\\boxed{\\log 5}", "5"), ("\\boxed{5\\log 2}", "5"),
    ("\\boxed{\\sin 5}", "5"), ("\\boxed{5\\theta}", "5"), ("\\boxed{\\theta=5}", "6"), ("\\boxed{5\\alpha}", "5"),
    ("\\boxed{5n}", "5"), ("\\boxed{5 n}", "5"), ("\\boxed{n 5}", "5"), ("\\boxed{|5|}", "-5"),
    ("\\boxed{\\lfloor 5.5 \\rfloor}", "5.5"), ("\\boxed{5\\times}", "6"), ("$5 x$", "5"), ("$5\\cdot x$", "5"),
    ("5·x", "5"), ("5 * x", "5"), ("5 x + 1", "5"), ("a + 5", "5"), ("5 + a", "5"), ("5a + b", "5"), ("(5, 6)", "6"),
    ("[5, 6]", "6"), ("{5, 6}", "6"), ("<5, 6>", "6"), ("\\langle 5,6\\rangle", "6"), ("5, a", "5"), ("a, 5", "5"),
    ("5; a", "5"), ("x=5, y=6", "6"), ("x = 5 and y = 6", "6"), ("x: 5, y: 6", "6"), ("5 = x = 6", "5"),
    ("5 ≠ 6", "6"), ("5 < 6", "6"), ("5 < x", "5"), ("x ∈ [5,6]", "6"), ("x → 5", "6"), ("5 ∪ 6", "6"),
    ("5 mod 6", "6"), ("5 | 6", "6"), ("6 5", "5"), ("5\n6", "5"), ("5.6", "5"), ("5.6.7", "5"), ("5,6,7", "567"),
    ("5-", "6"), ("5e", "5"), ("5e6", "5"), ("5E6", "6"), ("0x5", "5"), ("5h30", "5"), ("5'6\"", "5"),
    ("5ft 6in", "6"), ("5 ft 6 in", "6"), ("5 hours 30 minutes", "30"), ("5 hours and 30 minutes", "30"),
    ("$5 and 30 cents", "30"), ("2 dozen", "3"), ("5 lbs 6 oz", "6"),
    ("I'd go with (C) or (D).", "C"), ("Answer: C or D", "C"), ("Step 1: 18\nStep 2: 20", "18"),
    ("The answer is between 17 and 19, about 18?", "17"), ("18? I am not sure. Perhaps 19.", "18"),
    ("I cannot determine the answer.", "18"), ("No answer", "no"), ("There is no answer.", "no"), ("None", "0"),
    ("The answer is none of these.", "A"), ("To be or not to be", "to be"),
    ("The answer is Paris, or London.", "Paris"), ("The answer is Paris; or London", "Paris"),
    ("Answer: A\nAnswer: B", "A"), ("(A)\n(B)", "A"), ("<answer>5</answer><answer>6</answer>", "5"),
    ("<answer>5</answer> Hmm, <answer>6</answer>", "5"), ("\\boxed{5}, no, \\boxed{6}", "5"), ("\\boxed{}", "5"),
    ("\\boxed{5", "6"), ("####", "5"), ("The answer is", "5"), ("Answer:", "5"), ("<answer>", "5"), ("</think>", "5"),
    ("5 </think>", "5"), ("5</think> 6", "5"), ("The capital is not Paris.", "Paris"),
    ("It is Paris or London.", "Paris"), ("It is Paris and London.", "London"),
    ("\\fbox{18}", "8"), ("\\boxed 5", "6"), ("Answer - 42", "-42"), ("Answer -42", "42"),
    ('{"answer": 17, "other": 18}', "18"), ('{"answer": "5 or 6"}', "6"), ('{"answer": ', "5"), ('{"answer": 5', "6"),
    ('{"answer": "not 5"}', "5"), ('{"answer": [1, 2]}', "2"), ('{"answer": ' + "[" * 9000, "5"),
]  # fmt: skip

# What floats cannot tell apart, or say about every sign.
WRONG_EXPRESSIONS = [
    ("e^{-1000}", "0"), ("e^{-2000}", "e^{-1000}"), (r"(1/\pi)^{5000}", "0"), ("e^{1001x}", "e^{1000x}"),
    ("x^2e^{-10000x^2}", "e^{-10000x^2}"), (r"\sin\pi/10^{16}", "0"), (r"\sin\pi+10^{-17}", "0"), ("e^{-600}+1", "1"),
    (r"\pi+10^{-17}", r"\pi"), ("|a-c|", "a-c"), ("|p-x|", "p-x"), (r"\sqrt{(a+b)^2}", "a+b"), ("|ab|", "ab"),
    ("|xy|", "xy"), (r"\sqrt{x^2}", "x"), ("|m||n|", "mn"), ("|abc|", "abc"),
    ("1,2,2", "1,2"), (r"\boxed{1,2,2}", "1,2"), ("0.333334", "1/3"), ("333333.4", "1000000/3"), ("0.666668", "2/3"),
    ("3.141594", r"\pi"),
]  # fmt: skip
RIGHT_EXPRESSIONS = [
    ("0.333333", "1/3"), ("0.666666", "2/3"), ("0.666667", "2/3"), ("3.141593", r"\pi"), ("3.141592", r"\pi"),
    (r"\{1,2,2\}", r"\{1,2\}"), ("(1,2), (3,4), (1,2)", "(1,2),(3,4)"),
]  # fmt: skip

# Sums left to the reader; case, primes and !.
WRONG_FORMULAS = [
    ("(9)(2)", "18"),
    ("9(2)", "18"),
    ("9{2}", "18"),
    ("2(9)", "18"),
    ("|20|-|2|", "18"),
    ("20 - |2|", "18"),
    ("20-e^0-e^0", "18"),
    ("20+i^2+i^2", "18"),
    ("sqrt(324)", "18"),
    ("\\log_2 262144", "18"),
    ("exp(ln(9)+ln(2))", "18"),
    ("36\\pi/(2\\pi)", "18"),
    ("36\\div2", "18"),
    ("9++9", "18"),
    ("18x/x", "18"),
    ("9 \\ast 2", "18"),
    ("3\\cdot6", "18"),
    ("(36)/(2)", "18"),
    ("20-2", "18"),
    ("2\\times 9", "18"),
    ("\\sqrt{324}", "18"),
    ("\\frac{36}{2}", "18"),
    ("36/2", "18"),
    ("\\sqrt[3]{5832}", "18"),
    ("18^1", "18"),
    ("\\binom{18}{1}", "18"),
    ("20+-2", "18"),
    ("\\lfloor 18.5 \\rfloor", "18"),
    ("|18|", "18"),
    ("|-18|", "18"),
    ("1+\\frac12", "1.5"),
    ("1 + 1/2", "1.5"),
    ("1\\div2", "0.5"),
    ("2(1/4)", "0.5"),
    ("10^1+8", "18"),
    ("f(x)", "f'(x)"),
    ("y'+y=0", "y''+y=0"),
    ("6", "6'"),
    ("n", "n!"),
    ("n-1", "(n-1)!"),
    ("5", "5!"),
    ("n!", "n!!"),
    ("2x", "2X"),
    ("x", "X"),
    ("X", "x"),
    ("r^2", "R^2"),
    ("R^2", "r^2"),
    ("\\Delta", "\\delta"),
    ("P(a)", "p(A)"),
    ("f(x)", "F(x)"),
    ("a", "B"),
    ("x'", "x"),
    ("2n!", "2n"),
    ("V=iR", "V=IR"),
    ("k", "K"),
    ("12", "12'"),
    ("f''(x)", "f'(x)"),
]
RIGHT_FORMULAS = [
    ("f'(x)", "f'(x)"),
    ("n!", "n!"),
    ("(n-1)!", "(n-1)!"),
    ("5!", "5!"),
    ("n!!", "n!!"),
    ("2X", "2X"),
    ("x", "x"),
    ("X", "X"),
    ("a", "A"),
    ("(a)", "A"),
    ("b", "(B)"),
    ("P(A)", "P(A)"),
    ("y''+y=0", "y''+y=0"),
    ("3\\frac12", "3.5"),
    ("-3\\frac12", "-3.5"),
    ("\\frac{1}{-2}", "-0.5"),
    ("10^{-3}", "0.001"),
    ("5\\cdot10^3", "5000"),
    ("-\\frac{1}{2}", "-0.5"),
    ("-(5)", "-5"),
    ("x = 18", "18"),
    ("'18'", "18"),
    ("The answer is 'x'.", "x"),
    ("The answer is x.", "x"),
    ("Kf3", "Kf3"),
    ("The answer is E4", "E4"),
    ("Yes!", "yes"),
    ("PARIS!", "Paris"),
    ("\\text{Paris}", "paris"),
    ("2:30 pm", "2:30 PM"),
    ("f'(x) = 2x", "2x"),
    ("The answer is $n!$.", "n!"),
]

# Words and signs that scale a number, units that differ, and the letters of inequalities.
WRONG_UNITS = [
    ("7 tenths", "7"),
    ("7 hundredths", "7"),
    ("7 halves", "7"),
    ("7 gross", "7"),
    ("7 quadrillion", "7"),
    ("7 pi", "7"),
    ("7 ppm", "7"),
    ("7 mio", "7"),
    ("$7m", "7"),
    ("7万", "7"),
    ("7百", "7"),
    ("7 тыс", "7"),
    ("7 thousandths", "7"),
    ("7 dozen", "7"),
    ("$7b", "7"),
    ("7 π", "7"),
    ("7-tenths", "7"),
    ("18 dozen", "18"),
    ("18 bps", "18"),
    ("18₉", "18"),
    ("18 halved", "18"),
    ("18 doubled", "18"),
    ("18 basis points", "18"),
    ("18‰", "18"),
    ("18 score", "18"),
    ("18 fifths", "18"),
    ("5 point nine", "5"),
    ("five hundredths", "5"),
    ("five squared", "5"),
    ("five point nine", "5"),
    ("five dozen", "5"),
    ("five cubed", "5"),
    ("5 cubed", "5"),
    ("five gross", "5"),
    ("5\\text{ m}", "5\\text{ cm}"),
    ("3  m", "3  cm"),
    ("5 cm^3", "5 cm^2"),
    ("5 cm", "5 cm^2"),
    ("5 cents", "$5"),
    ("€5", "$5"),
    ("5€", "$5"),
    ("5 PM", "5 AM"),
    ("5 °F", "5 °C"),
    ("5°F", "5°C"),
    ("5 MB", "5 kB"),
    ("5 mV", "5 V"),
    ("5 kW", "5 W"),
    ("5¢", "$5"),
    ("£5", "$5"),
    ("5 square meters", "5 cubic meters"),
    ("5 meters", "5 square meters"),
    ("5 ms", "5 s"),
    ("5 mg", "5 g"),
    ("5 m³", "5 m²"),
    ("5 GHz", "5 MHz"),
    ("5 kPa", "5 Pa"),
    ("5^\\circ F", "5^\\circ C"),
    ("y>2", "x>2"),
    ("1<y<2", "1<x<2"),
    ("x<1 and x>2", "x<1 or x>2"),
    ("x<1 or x>2", "x<1 and x>2"),
    ("y \\in (2,\\infty)", "x>2"),
    ("y \\ge 2", "x \\ge 2"),
    ("2 < y", "x > 2"),
]
RIGHT_UNITS = [
    ("$7m", "7000000"),
    ("5\\text{ cm}", "5\\text{ cm}"),
    ("5 cm^2", "5 cm^2"),
    ("5 cm²", "5\\text{ cm}^2"),
    ("5 AM", "5 am"),
    ("5 °C", "5 Celsius"),
    ("5 square meters", "5 m^2"),
    ("$5", "5 dollars"),
    ("5 cents", "5 cent"),
    ("5¢", "5"),
    ("5 kB", "5 KB"),
    ("7 quarters", "7"),
    ("18 pieces", "18"),
    ("five", "5"),
    ("five apples", "5"),
    ("two thirds", "2/3"),
    ("a dozen", "12"),
    ("two dozen", "24"),
    ("seven", "7"),
    ("5 m", "5"),
    ("5", "5 MB"),
    ("5 volts", "5 V"),
    ("x>2", "x>2"),
    ("2<x", "x>2"),
    ("1<x<2", "(1,2)"),
    ("x \\in (2,\\infty)", "x>2"),
    ("x<1 or x>2", "x<1 or x>2"),
    ("18 miles", "18"),
    ("18", "18"),
    ("18 pounds", "18 lb"),
    ("£5", "5"),
    ("0 < f(x) < 1", "(0,1)"),
]

# Each text offers several answers: in no form may it be right for two of them.
HEDGES = [
    ("17 \\approx 18", ["17", "18"]),
    ("1≈2≈3", ["1", "2", "3"]),
    ("\\frac12 \\approx \\frac13", ["1/2", "1/3"]),
    ("17 = 18", ["17", "18"]),
    ("A: The answer is B: C", ["A", "B", "C"]),
    ("A: \\boxed{B: C}", ["A", "B", "C"]),
    ("A. \\boxed{B}", ["A", "B"]),
    ("\\boxed{A: B}", ["A", "B"]),
    ("A is B", ["A", "B"]),
    ("A since it is B", ["A", "B"]),
    ("**A** is **B**", ["A", "B"]),
    ("**Paris** is London", ["Paris", "London"]),
    ("Paris because London", ["Paris", "London"]),
    ("Paris because it is London", ["Paris", "London"]),
    ("$x^2$ is x^3", ["x^2", "x^3"]),
    ("2x because x^2 is x^3", ["2x", "x^3", "x^2"]),
    ("yes: it is false", ["yes", "false", "true", "no"]),
    ("Yes because it is no", ["yes", "no"]),
    ("**yes** but no", ["yes", "no"]),
    ("True, so no", ["true", "no"]),
    ("$x$ = **y**", ["x", "y"]),
    ("Berlin, since **Paris** is in France", ["Berlin", "Paris"]),
    ("A, though B is right", ["A", "B"]),
    ("B or A", ["A", "B"]),
    ("I pick A over B", ["A", "B"]),
    ("A → B", ["A", "B"]),
    ("(A) → (B)", ["A", "B"]),
    ("A = B", ["A", "B"]),
    ("A/B", ["A", "B"]),
    ("A, no, B", ["A", "B"]),
    ("not A but B", ["A"]),
]
WRONG_BY_WHAT_STANDS_BESIDE = [
    ("(A)(B)", "A"),
    ("[A][B]", "A"),
    ("(A) B", "A"),
    ("A - B", "A"),
    ("A — B", "A"),
    ("A... B", "A"),
    ("A as well as B", "A"),
    ("A is the opposite; choose B", "A"),
    ("A is not right", "A"),
    ("B is not the answer", "B"),
    ("All except (B)", "B"),
    ("I'd avoid option B", "B"),
    ("Option B is eliminated", "B"),
    ("It is not **18**.", "18"),
    ("more than **18**", "18"),
    ("6 or **5**", "5"),
    ("So x is -**5**.", "5"),
    ("x = -$5$", "5"),
    ("-\\(5\\)", "5"),
    ("negative **5**", "5"),
    ("2 * **5**", "5"),
    ("-$x^2$", "x^2"),
    ("5 + $\\sqrt2$", "\\sqrt2"),
    ("1/$\\sqrt2$", "\\sqrt2"),
    ("It is not $x^2$", "x^2"),
    ("negative  5", "5"),
    ("\\text{minus } 5", "5"),
    ("minus  5", "5"),
    ("-\\boxed{5}", "5"),
    ("\\boxed{5} or 6", "5"),
    ("\\boxed{5} million", "5"),
    ("\\boxed{5}0", "5"),
    ("2\\boxed{5}", "5"),
    ("not \\boxed{5}", "5"),
    ("The wrong answer is 18", "18"),
    ('{"wrong_answer": 18}', "18"),
    ("**5** or 6", "5"),
    ("**5** + 3", "5"),
    ("**5** million", "5"),
    ("**18** is not the answer", "18"),
    ("18 is not the answer", "18"),
    ("18 is wrong", "18"),
    ("It isn't \\boxed{5}", "5"),
    ("minus \\boxed{5}", "5"),
    ("6 or \\boxed{5}", "5"),
    ("\\boxed{5} + 3", "5"),
    ("$-\\boxed{x}$", "x"),
    ("London or \\boxed{Paris}", "Paris"),
    ("It is not \\boxed{Paris}", "Paris"),
    ("It is not **Paris**", "Paris"),
    ("**Paris** is not it", "Paris"),
    ("It is less than \\boxed{5}", "5"),
    ("twice **9**", "9"),
    ("\\boxed{5}\\times 3", "5"),
    ("3\\cdot\\boxed{5}", "5"),
    ("5/\\boxed{2}", "2"),
    ("The incorrect answer: B", "B"),
    ("The answer is not B", "B"),
    ("Paris or **London**", "London"),
    ("at least 18", "18"),
    ("at most 18", "18"),
    ("up to 18", "18"),
    ("under 18", "18"),
    ("over 18", "18"),
    ("below 18", "18"),
    ("more than 18", "18"),
    ("less than 18", "18"),
    ("above 18", "18"),
    ("&gt; 18", "18"),
    ("x &lt; 18", "18"),
    ("no more than 18", "18"),
    ("at least $18", "18"),
    ("at most about 18", "18"),
    ("fewer than 18", "18"),
    ("greater than 18", "18"),
    ("The answer is at least 18.", "18"),
    ("18 or above", "18"),
    ("a maximum of 18", "18"),
    ("x", "18"),
]
RIGHT_BESIDE = [
    ("-\\boxed{5}", "-5"),
    ("x = -\\boxed{5}", "-5"),
    ("- \\boxed{5}", "5"),
    ("- **18**", "18"),
    ("Total - **18**", "18"),
    ("So x is -**5**.", "-5"),
    ("17.6 \\approx 18", "18"),
    ("1/3 ≈ 0.33", "1/3"),
    ("\\sqrt2 \\approx 1.41", "\\sqrt2"),
    ("3 + 4 = 7", "7"),
    ("So, B is correct.", "B"),
    ("It's B", "B"),
    ("I'd go with B", "B"),
    ("The answer would be B", "B"),
    ("B, since A and C are too small", "B"),
    ("(B) It melts", "B"),
    ("B. It does not melt", "B"),
    ("So B.", "B"),
    ("I think it is (B).", "B"),
    ("The answer is B because A is wrong.", "B"),
    ("B, not A or C", "B"),
    ("**B** is correct", "B"),
    ("B is the correct answer.", "B"),
    ("Therefore, the correct option is B) Paris.", "B"),
    ("Yes.\n\nExplanation: 3 > 2", "yes"),
    ("It's true", "true"),
    ("The statement is false.", "false"),
    ("So the answer is **Yes**", "yes"),
    ("No, it is not true.", "no"),
    ("Yes", "yes"),
    ("The capital is **Paris**", "Paris"),
    ("**Paris** is the capital.", "Paris"),
    ("\\boxed{18}!", "18"),
    ("18", "18"),
]


ALL_RIGHT = [*RIGHT, *MORE_RIGHT, *RIGHT_EXPRESSIONS, *RIGHT_BESIDE, *RIGHT_FORMULAS, *RIGHT_UNITS]
ALL_WRONG = [*WRONG, *MORE_WRONG, *WRONG_EXPRESSIONS, *WRONG_BY_WHAT_STANDS_BESIDE, *WRONG_FORMULAS, *WRONG_UNITS]


@pytest.mark.parametrize(("completion", "answer"), ALL_RIGHT)
def test_right_answers_are_right(completion, answer):
    assert is_correct(completion, answer)


@pytest.mark.parametrize(("completion", "answer"), ALL_WRONG)
def test_wrong_answers_are_wrong(completion, answer):
    assert not is_correct(completion, answer)


@pytest.mark.parametrize(("text", "answers"), HEDGES)
def test_a_hedge_is_right_for_one_answer_at_most(text, answers):
    for form in ("{}", r"\boxed{{{}}}", "The answer is {}", "<answer>{}</answer>", "#### {}", "So **{}**."):
        assert sum(is_correct(form.format(text), answer) for answer in answers) <= 1, form


# Repeated until a text is long, in the ways that patterns with nested repetition take for ever over.
FRAGMENTS = [
    "9", "a", " ", "\n", "-", "1,", "1.", "1/", "1 ", "(", "{", "[", "$", "*", "**", "_", "`", "```\n", "#", "####",
    "#### 5\n", "<answer>", "<think>", "</think>", "\\boxed{", "\\boxed{1}, ", "\\text{", "\\frac{1}{", "\\sqrt{",
    "answer is ", "answer:\n", "answer    ", "the answer is 5. ", "$a$ and ", "x = 1, ", "5 or ", "not ", "1e9", "2^",
    "!", "½", "１", "1\u2009000", "<|im_end|>", "&", "\\\\", "(A) ", "seven ", "1'000", "1×", "\\pm", "x<", "f(", "|",
    "x_{1}", "because ", "**a** ", "*a* ", "1{,}000", "10^{", "3:30 ", "<<1+1=2>>", "1e9\\[１option A ", "\\le1'000",
    "\\frac_1^·", "or **\\frac{1}{", "-**a\u2009",
]  # fmt: skip
EXPENSIVE = [
    "10^99999999", "9^9^9^9", r"10^{10^{10}}", "99999!", r"9^{(9^{9})}", r"(10)^{999x}", r"(9999999)!", r"{9999999}!",
    r"\binom{10^{9}}{5\cdot 10^{8}}", r"999^{999\cdot 999\cdot 99}", r"((999^{999})^{999})^{999}", "2^{99 999}",
    r"\exp(\exp(\exp(10)))", r"\sum_{k=1}^{99999999} \frac{1}{k^2}", r"\prod_{k=1}^{999999} k",
    r"\int_0^1 \frac{\sin(x^{x^x})}{x^{x}+1} dx", r"(x+y+z+w)^{99}", r"\frac{1}{1+" * 20 + "1" + "}" * 20,
    r"\sqrt{2+" * 30 + "2" + "}" * 30, "1e999999999", "1e-999999999", "x^" * 100 + "x", "-" * 300 + "x", "(x+1)" * 80,
    "x^{999}" * 50, "9" * 380 + "x", "((x)!)!", "500!" * 30, "x/" * 190 + "x", "2^{-6000}x", "1/3^{999}+x",
    "f(" * 40 + "x" + ")" * 40,
    r"\log_2" * 60 + "x", r"\pm" * 60 + "1", "1,2," * 90 + "3", r"\cup" * 60 + "(1,2)", "0x" + "f" * 390, "9" * 4400,
    "1e999", "{" * 390,
]  # fmt: skip


def is_fast(completion, answer):
    """True where is_correct takes less than 50 ms of a core, at best of three; what it says does not matter."""
    for _ in range(3):
        began = time.thread_time()
        is_correct(completion, answer)
        if time.thread_time() - began < 0.05:
            return True
    return False


@pytest.mark.parametrize(("length", "every"), [(50_000, 1), (1_000_000, 6)])
def test_long_texts_are_decided_within_50_ms(length, every):
    for fragment in FRAGMENTS[::every]:
        for form in ("{}", "answer is {}", r"\boxed{{{}}}", "<answer>{}5"):
            text = form.format(fragment * (length // len(fragment)))
            assert all(is_fast(text, answer) for answer in ("5", "x^2+1", "Paris")), (form, fragment)


def test_one_word_of_many_letters_and_many_spaces_take_no_time():
    for text in ("1" + "e" * 590 + "@", "1" + "万" * 590 + "@", "1 " + "ab " * 190 + "@", "a" + " " * 9900 + "b",
                 "\\boxed{18}" + " " * 9900 + "B", "\\boxed{18}" + "\t" * 9900 + "B", "x =" + " " * 590 + "b",
                 "x =" + " \n" * 290 + "b"):  # fmt: skip
        for form in ("{}", "answer is {}", r"\boxed{{{}}}", "<answer>{}"):
            assert all(is_fast(form.format(text), answer) for answer in ("18", "x^2+1", "Paris")), (form, text[:20])


def test_expressions_that_take_for_ever_are_decided_in_milliseconds():
    algebra.read.cache_clear()
    for text in EXPENSIVE:
        for answer in ("5", "x + 1", r"\frac{\pi}{2}", "1, 2", "(x+y+z+w)^{99}+1"):
            began = time.thread_time()
            assert not is_correct(f"\\boxed{{{text}}}", answer)
            assert not is_correct(f"The answer is {answer}", text) or text.strip() == answer
            # Results are kept, so the first time is the one that counts: with room for a machine that is busy.
            assert time.thread_time() - began < 0.2, text


def test_many_answers_a_second():
    """The shape of GSM8K's solutions; on an idle core of a server about 15,000 a second."""
    answers = [str(value) for value in range(7, 407)]
    texts = [
        f"Each day the ducks lay {answer} eggs and she eats 7, so {answer} - 7 = <<{answer}-7=1>>1 are for sale.\n" * 3
        + f"She sells 2 * 9 = $<<2*9=18>>18 per day\nA: {answer}"
        for answer in answers
    ]
    times = []
    for _ in range(3):
        began = time.thread_time()
        assert all(map(is_correct, texts, answers))
        times.append(time.thread_time() - began)
    # In the time of one core. 5,000 a second is what is promised of a server's; half of it is asked of any machine.
    assert len(texts) / min(times) > 2_500


def test_verdicts_are_the_same_in_every_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(is_correct(r"\frac{35}{70}", "0.5")))
    thread.start()
    thread.join()
    assert found == [True]


def test_extract_answer():
    assert extract_answer(r"first \boxed{1}, then \boxed{\frac{1}{2}} indeed") == r"\frac{1}{2}"
    assert extract_answer("a\n#### 7\nor rather the answer is 8.") == "8"
    assert extract_answer("<answer>cut off 7") == "cut off 7"
    assert extract_answer("I count 3 of them.\nThat is all.") == "I count 3 of them."
    assert marked_answer("The answer is 8.") == ""
    assert marked_answer("48/2 = 24\n#### 24 ") == "24"


def rewards_of(name, texts, answers=None):
    function = resolve_rewards([name])[0]
    columns = {} if answers is None else {"answer": answers}
    as_text = function(prompts=["?"] * len(texts), completions=texts, completion_ids=[[1]] * len(texts), **columns)
    as_chat = [[{"role": "assistant", "content": text}] for text in texts]
    assert function(prompts=["?"] * len(texts), completions=as_chat, **columns) == as_text
    return as_text


def test_rewards_by_answer():
    texts, answers = ["5", "6", "none", "5"], ["5", "5", "5", ""]
    assert rewards_of("accuracy", texts, answers) == [1.0, 0.0, 0.0, None]
    assert rewards_of("correct", texts, answers) == [2.0, 0.0, 0.0, None]
    assert rewards_of("closeness", texts, answers) == [1.0, pytest.approx(0.5 * math.exp(-1 / 3)), 0.0, None]
    # Repeating the question is worth nothing.
    assert rewards_of("closeness", ["2 + 3"], ["5"]) == [0.0]
    # Errors beyond what a float holds are worth nothing, and do not fail.
    assert rewards_of("closeness", ["9" * 400], ["5"]) == [pytest.approx(0)]
    with pytest.raises(InputError, match="needs a column 'answer'"):
        rewards_of("accuracy", texts)


def test_rewards_by_form():
    good = "<reasoning>\n1 + 4\nis 5\n</reasoning>\n<answer>\n5\n</answer>\n"
    one_line = "<reasoning>1 + 4</reasoning> <answer>5</answer>"
    chatter = good + "Any more questions?"
    assert rewards_of("strict_format", [good, one_line, chatter, "5"]) == [0.5, 0.0, 0.0, 0.0]
    assert rewards_of("soft_format", [good, one_line, chatter, "5"]) == [0.5, 0.5, 0.5, 0.0]
    after = len("Any more questions?")
    assert rewards_of("tags", [good, one_line, chatter, "5"]) == [
        0.5,
        0.0,
        pytest.approx(0.5 - 0.001 * after),
        0.0,
    ]
    assert rewards_of("tags", [good + "x" * 9000]) == [0.0]
    assert rewards_of("integer", [good, "-1,000", "5.0", "5 dollars", ""]) == [0.5, 0.5, 0.0, 0.0, 0.0]


def test_resolve_rewards_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_the_test.py").write_text("def brevity(completions, **_):\n    return [1.0]\nNAME = 3\n")
    (tmp_path / "my_broken_rewards.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    brevity, accuracy = resolve_rewards(["my_rewards_of_the_test:brevity", "accuracy"])
    assert brevity(completions=["a"]) == [1.0]
    assert accuracy.__name__ == "accuracy"
    for name, message in [
        ("accurracy", "unknown reward 'accurracy'; nearest: accuracy"),
        ("no_such_module:f", "importing 'no_such_module' failed"),
        ("my_broken_rewards:f", "ZeroDivisionError"),
        ("my_rewards_of_the_test:brevty", "has no function 'brevty'"),
        ("my_rewards_of_the_test:NAME", "has no function 'NAME'"),
    ]:
        with pytest.raises(InputError, match=message):
            resolve_rewards([name])
    with pytest.raises(InputError, match="at least one"):
        resolve_rewards([])
