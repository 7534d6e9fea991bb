"""What the chart says about the binary is true."""

import os
import re
import subprocess
import tempfile
import unittest
from functools import cache
from pathlib import Path

import generate
from chart import CHART, TOP, containers, env, objects, pods, required, value_sets

AUTHORITY = TOP / "src/directory/ca/authority.pem"
BINARY = os.environ.get("POSTROOM_TEST_BINARY", str(TOP / "target/debug/postroom"))


@cache
def help_of(*command):
    return subprocess.run([BINARY, *command, "--help"], check=True, capture_output=True, text=True).stdout


def variables():
    """Every variable that the binary reads, and the default of each, as its help has them."""
    page = help_of().split("\nSettings:")[1]
    found = {}
    for name, secret, text in re.findall(r"^  ((?:POSTROOM|OTEL)_\w+)=\S*( \(or (?:POSTROOM|OTEL)_\w+\))?((?:\n      .*)+)", page, re.M):
        default = re.search(r"\[default:\s+(.*?)\]", " ".join(text.split()))
        found[name] = default[1] if default else None
        if secret:
            found[secret.split()[-1].strip(")")] = None
    return found


class Binary(unittest.TestCase):
    def test_every_variable_of_the_binary_can_be_set(self):
        found = {name for name in variables() if not name.endswith("_FILE") or name.endswith("_CA_FILE")}
        self.assertGreater(len(found), 40)
        settings = {name for name, _, _, _ in generate.setting_rows()}
        self.assertEqual(found, settings, "docs/configuration.md")
        values = (CHART / "values.yaml").read_text()
        for name, path in generate.ELSEWHERE.items():
            self.assertIn(name, settings)
            self.assertIn(path.split(".")[0] + ":", values)

    def test_every_variable_of_the_chart_exists(self):
        known = variables()
        for name, values in value_sets().items():
            for pod in pods(objects(values)):
                for container in containers(pod):
                    unknown = {it for it in env(container) if it.startswith(("POSTROOM_", "OTEL_"))} - set(known)
                    self.assertEqual(unknown, set(), f"{name}: {pod['metadata']['name']}")

    def test_the_binary_accepts_what_the_chart_sets(self):
        """The binary names all wrong settings at once: beside one made wrong on purpose there is no other."""
        url = {"rabbitmq": "amqps://user:password@host:5671/vhost", "postgres": "postgres://user:password@host/database"}
        keys = {name: subprocess.check_output([BINARY, "key", "generate"], text=True) for name in ("encryption", "override")}
        keys["headers"] = "authorization=Bearer%20token"
        for name, values in value_sets().items():
            for kind, wrong in (("worker", "POSTROOM_CONCURRENCY"), ("bridge", "POSTROOM_WEBHOOK_CONCURRENCY")):
                found = [c for pod in pods(objects(values)) for c in pod["spec"]["containers"] if c["args"] == [kind]]
                for container in found:
                    with self.subTest(f"{name}: {kind}"), tempfile.TemporaryDirectory() as folder:
                        environment = self.environment(container, Path(folder), {**url, **keys})
                        environment[wrong] = "0"
                        done = subprocess.run([BINARY, kind], env=environment, capture_output=True, text=True, timeout=60)
                        self.assertEqual(done.returncode, 2, done.stderr)
                        named = set(re.findall(r"(?:POSTROOM|OTEL)_\w+", done.stderr))
                        self.assertEqual(named, {wrong}, done.stderr)

    def environment(self, container, folder, contents):
        """The variables of a container, with files in this folder in place of mounted ones."""
        parts = {"RABBITMQ_USERNAME": "user", "RABBITMQ_PASSWORD": "a-b_c", "RABBITMQ_HOST": "rabbitmq.mail.svc", "RABBITMQ_PORT": "5672"}
        found = {}
        for name, value in env(container).items():
            if name in parts:
                continue
            value = re.sub(r"\$\((\w+)\)", lambda match: parts[match[1]], value)
            if name.endswith("_FILE"):
                path = folder / value.removeprefix("/etc/postroom/")
                path.parent.mkdir(exist_ok=True)
                path.write_text(contents.get(path.name) or contents.get(path.parent.name, AUTHORITY.read_text()))
                value = str(path)
            found[name] = value
        return found

    def test_places_of_their_own_are_really_used(self):
        """Every variable with a place of its own in values.yaml is set when that place is filled."""
        found = objects(value_sets()["everything"]) + objects(value_sets()["url-init"])
        found += objects(required(storage__publicUrl="https://x.example", storage__linkLifetime="1d"))
        used = {name.removesuffix("_FILE") for pod in pods(found) for c in containers(pod) for name in env(c)}
        self.assertLessEqual({name.removesuffix("_FILE") for name in generate.ELSEWHERE}, used)

    def test_every_command_and_flag_of_the_chart_exists(self):
        found = set()
        for values in value_sets().values():
            for pod in pods(objects(values)):
                found |= {tuple(container["args"]) for container in containers(pod)}
        self.assertIn(("worker",), found)
        for args in found:
            with self.subTest(" ".join(args)):
                command = [it for it in args[: 2 if args[0] in ("topology", "tenant") else 1]]
                page = help_of(*command)
                for flag in (it for it in args if it.startswith("--")):
                    self.assertIn(f"{flag} ", page)

    def test_commands_in_the_notes_exist(self):
        text = (CHART / "templates/NOTES.txt").read_text()
        for command in re.findall(r"^  postroom (.*)$", text, re.M):
            words = re.match(r"[a-z ]+", command)[0].split()[:2]
            page = help_of(*words)
            for flag in re.findall(r"--[a-z-]+", command):
                with self.subTest(f"{words} {flag}"):
                    self.assertIn(flag, page)

    def test_defaults_that_the_chart_reckons_with_are_those_of_the_binary(self):
        known = variables()
        helpers = (CHART / "templates/_helpers.tpl").read_text()
        self.assertIn(f'default "{known["POSTROOM_GRACE_PERIOD"]}" $settings.gracePeriod', helpers)
        self.assertIn(f'default {known["POSTROOM_DATABASE_POOL_SIZE"]} $settings.databasePoolSize', helpers)
        self.assertIn(f'default "{known["POSTROOM_PREFIX"]}" $settings.prefix', helpers)
        schema = known["POSTROOM_DATABASE_SCHEMA"]
        self.assertIn(f'default "{schema}" $settings.databaseSchema', (CHART / "templates/scaling.yaml").read_text())
        values = (CHART / "values.yaml").read_text()
        self.assertIn(f"memoryBudget ({known['POSTROOM_MEMORY_BUDGET']})", values)

    def test_the_chart_is_of_the_version_of_the_binary(self):
        version = re.search(r'^version = "(.*?)"', (TOP / "Cargo.toml").read_text(), re.M)[1]
        self.assertIn(f'appVersion: "{version}"\n', (CHART / "Chart.yaml").read_text())

    def test_queues_are_those_that_the_binary_declares(self):
        environment = {**os.environ, "POSTROOM_AMQP_URL": "amqp://guest:guest@localhost:5672/%2F", "POSTROOM_PREFIX": "post"}
        printed = subprocess.run([BINARY, "topology", "print"], check=True, capture_output=True, text=True, env=environment).stdout
        triggers = [it for o in objects(value_sets()["everything"]) if o["kind"] == "ScaledObject" for it in o["spec"]["triggers"]]
        names = {it["metadata"]["queueName"] for it in triggers if it["type"] == "rabbitmq"} - {"post.jobs.low.acme"}
        for name in names | {"post.reports.bridge"}:
            self.assertIn(f'"{name}"', printed)
