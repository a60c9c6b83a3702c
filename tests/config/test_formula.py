"""Formulas of ``norm=custom``: what each means, and one clear line for whatever isn't one."""

import time

import pytest
from conftest import tiny

import simlab
from simlab.config import ConfigError
from simlab.config.formula import formula_of
from simlab.config.overrides import as_overrides


@pytest.mark.parametrize(
    ("text", "norms", "normalises"),
    [
        ("x + F(N(x))", ["norm_in"], None),
        ("x + N(F(x))", ["norm_out"], "branch"),
        ("N(F(x)) + 2*x/2", ["norm_out"], "branch"),
        ("2*x + N(F(x))", ["norm_out"], None),  # not v + 1
        ("x + 0.5*N(F(x))", ["norm_out"], None),
        ("x + N(2*F(x))", ["norm_out"], None),  # its moment isn't the raw branch's
        ("x + x0 + N(F(x))", ["norm_out"], None),
        ("N(x + F(x))", ["norm_out"], "stream"),
        ("N(x/L + F(N(x)))", ["norm_in", "norm_out"], "stream"),
        ("2*N(x + F(x))", ["norm_out"], None),
        ("N(x + F(x)) + 0.1*x0", ["norm_out"], None),
        ("N(x) + F(N(x))", ["norm_1", "norm_in"], "skip"),
        ("x + N(x + N(F(N(x + N(x0)))))", ["norm_1", "norm_in", "norm_2", "norm_out"], None),
    ],
)
def test_norms(text, norms, normalises):
    formula = formula_of(text)
    assert (list(formula.norms), formula.normalises) == (norms, normalises)


@pytest.mark.parametrize(
    ("text", "beside"),
    [
        ("N(x + F(x)) + x0", ["x"]),  # the residual add is to the stream
        ("x + N(x0 + F(x))", ["x"]),
        ("x + N(x + F(x))", ["x"]),
        ("N(x0 + F(x))", ["x0"]),
        ("N(x) + F(x) + x0", ["N", "x0"]),
    ],
)
def test_where_the_branch_is_added(text, beside):
    assert [part.of for part in formula_of(text).joined[:-1]] == beside


LINES = {
    "": "empty",
    "x": "has F 0 times",
    "3*L": "at character 1 (3*L): a number",
    "x + Q(N(x))": "at character 5 (Q(N(x))): no such name",
    "x + f(N(x))": "did you mean F?",
    "x + norm(F(x))": "did you mean N?",
    "depth*x + F(x)": "did you mean L?",
    "x_0 + F(x)": "did you mean x0?",
    "F(x)": "adds F's output to nothing",
    "N(F(N(x)))": "adds F's output to nothing",
    "x + F(F(x))": "has F 2 times; allowed: once",
    "x + F(x) + F(N(x))": "has F 2 times",
    "F(N(x))*x + x": "at character 1 (F(N(x))*x +): multiplies two vectors",
    "x + F(x) + 1": "at character 1 (x + F(x) + 1): a number and a vector",
    "x + 1/F(x)": "at character 5 (1/F(x)): divides by a vector",
    "x + 2F(x)": "at character 5 (2F(x)): not a number; a product is 2*x",
    "x + 2(F(x))": "at character 5 (2(F(x))): not a function; a product is",
    "x(2) + F(x)": "x isn't a function",
    "x + F(N(x)": "at character 6 ((N(x)): has no partner",
    "x + F(N(x)))": "at character 12 ()): has no partner",
    "x + F(x) +": "not a formula from here on",
    "x + F": "F needs something in parentheses",
    "x + F(2)": "F takes a vector",
    "x + F()": "F takes one thing",
    "x + F(*x)": "not of a formula",
    "sqrt(x) + F(x)": "sqrt takes a number",
    "x**2 + F(x)": "at character 1 (x**2 + F(x)): no powers; L squared is L*L, and its",
    "10**10**10*x + F(x)": "no powers",
    "L^2*x + F(x)": "L squared is L*L",
    "2×x + F(x)": "at character 2 (×x + F(x)): no such sign",
    "x − F(x)": "; minus is -",
    "x.real + F(x)": "not of a formula",
    "x if x else F(x)": "not of a formula",
    "True*x + F(x)": "not of a formula",
    "__import__(x)": "no such name",
    "__import__('os')": "at character 12 ('os')): no such sign",
    "lambda x: x": "no such sign",
    "x = x + F(x)": "write only what stands after the =",
    "x + λ*F(x)": "at character 5 (λ*F(x)): no such sign",
    "𝑥 + F(x)": "no such sign",  # which Python would read as x
    "x; F(x)": "no such sign",
    "0x1for x in x": "not a number",
    "x + F(x)/0": "with L=3 the factor of F(…) is not a number, as 1/0 and sqrt(-1) aren't; allowed: ",
    "x + F(N(x))/(l - 3)": "with L=3 and l=3 the factor of F(…) is not a number",
    "x + F(x/(L - 3))": "with L=3 the factor of x is not a number",
    "sqrt(-1)*x + F(x)": "the factor of x is not a number",
    "1e999*x + F(x)": "the factor of x is inf",
    "L*" * 80 + "x + F(x)": "the factor of x is 1.47809e+38",
    "(" * 195 + "x": "has no partner",
    "x + F(x)" + "+x" * 100: "208 characters; allowed: at most 200",
    "9" * 5000: "5000 characters",
}


@pytest.mark.parametrize("text", LINES)
def test_mistakes(text):
    started = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        tiny("norm=custom", f'norm.update="{text}"')
    assert time.perf_counter() - started < 5
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"norm.update={text[:50]}"), line
    assert LINES[text] in line, line


@pytest.mark.parametrize(
    "text",
    [
        "-" * 190 + "x+F(x)",
        "(" * 90 + "x" + ")" * 90 + "+F(x)",
        "x+" * 90 + "F(x)",
        "N(" * 60 + "x" + ")" * 60 + "+F(x)",
        "sqrt(" * 30 + "L" + ")" * 30 + "*x+F(x)",
        "1/" * 90 + "L*x+F(x)",
        "2*(x+" * 30 + "F(x)" + ")" * 30 + "/1e9",
        " x\t+\n F(x) ",
    ],
)
def test_deep_ones_are_read_at_once(text):
    started = time.perf_counter()
    config = tiny("norm=custom", f'norm.update="{text}"')
    assert time.perf_counter() - started < 5
    assert config.shape.norm.update == " ".join(text.split())


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_formula_in_quotes_of_its_own(quote):
    """As who knows the command line writes it in Python."""
    keys = {"norm": "custom", "norm.update": f"{quote}x + F(x){quote}"}
    config = simlab.compose(as_overrides(keys))
    assert config.shape.norm.update == "x + F(x)"


def test_the_mlps_own_formula():
    with pytest.raises(ConfigError, match=r"^norm\.mlp_update=x \+ G\(x\): at character 5"):
        tiny("norm=custom", 'norm.mlp_update="x + G(x)"')
    for empty in ("norm.update=null", "norm.update=true", "norm.update=[x]"):
        with pytest.raises(ConfigError, match=r"^norm\.update="):
            tiny("norm=custom", empty)
