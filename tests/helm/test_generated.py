"""Nothing that is generated is out of date."""

import unittest

import generate
from chart import GOLDEN, TOP, value_sets


class Generated(unittest.TestCase):
    maxDiff = None

    def is_up_to_date(self, files):
        for path, content in files.items():
            with self.subTest(path.relative_to(TOP)):
                self.assertTrue(path.exists(), "missing; run `make chart`")
                self.assertEqual(path.read_text(), content, "out of date; run `make chart` and look at the difference")

    def test_schema_and_readme_are_up_to_date(self):
        self.is_up_to_date(generate.generated())

    def test_golden_renders_are_up_to_date(self):
        self.is_up_to_date(generate.golden())

    def test_there_is_no_golden_render_without_values(self):
        self.assertEqual({path.stem for path in GOLDEN.glob("*.yaml")}, set(value_sets()))
