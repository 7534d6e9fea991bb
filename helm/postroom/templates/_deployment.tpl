{{/* The Deployment of a component. Arguments: root, component. */}}
{{- define "postroom.deployment" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $it := index $values .component -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "postroom.fullname" $root }}-{{ .component }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "postroom.labels" . | nindent 4 }}
  {{- include "postroom.block" (list 2 (include "postroom.annotations" (dict "root" $root))) }}
spec:
  {{- if eq $it.autoscaling.type "none" }}
  replicas: {{ $it.replicas }}
  {{- end }}
  strategy:
    {{- toYaml $it.strategy | nindent 4 }}
  selector:
    matchLabels:
      {{- include "postroom.selectorLabels" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "postroom.podLabels" . | nindent 8 }}
        {{- with $it.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- include "postroom.block" (list 6 (include "postroom.annotations" (dict "root" $root "more" $it.podAnnotations))) }}
    spec:
      serviceAccountName: {{ include "postroom.serviceAccountName" $root }}
      {{- include "postroom.podSpec" $root | nindent 6 }}
      terminationGracePeriodSeconds: {{ include "postroom.terminationGracePeriod" . }}
      {{- $init := eq $values.setup.mode "init" }}
      {{- if or $init $it.extraInitContainers }}
      initContainers:
        {{- if $init }}
        {{- include "postroom.migrateContainer" (dict "root" $root "postgresVolume" (ternary "setup-postgres" "postgres" (ne $values.setup.postgres.secret ""))) | nindent 8 }}
        {{- if $values.setup.topology }}
        {{- include "postroom.topologyContainer" (dict "root" $root "rabbitmqVolume" (ternary "setup-rabbitmq" "rabbitmq" (ne $values.setup.rabbitmq.secret ""))) | nindent 8 }}
        {{- end }}
        {{- end }}
        {{- with $it.extraInitContainers }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- end }}
      containers:
        {{- include "postroom.container" (dict "root" $root "name" .component "args" (list .component)) | nindent 8 }}
          env:
            {{- include "postroom.block" (list 12 (include "postroom.env" .)) }}
          {{- if or (and (eq .component "worker") $values.storage.secret) $it.extraEnvFrom }}
          envFrom:
            {{- if and (eq .component "worker") $values.storage.secret }}
            - secretRef:
                name: {{ $values.storage.secret }}
            {{- end }}
            {{- with $it.extraEnvFrom }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          {{- end }}
          ports:
            - name: http
              containerPort: {{ $values.http.port }}
              protocol: TCP
          startupProbe:
            httpGet: {path: /livez, port: http}
            {{- toYaml $values.probes.startup | nindent 12 }}
          livenessProbe:
            httpGet: {path: /livez, port: http}
            {{- toYaml $values.probes.liveness | nindent 12 }}
          readinessProbe:
            httpGet: {path: /readyz, port: http}
            {{- toYaml $values.probes.readiness | nindent 12 }}
          resources:
            {{- toYaml $it.resources | nindent 12 }}
          volumeMounts:
            {{- include "postroom.postgresMounts" $root | nindent 12 }}
            {{- include "postroom.block" (list 12 (include "postroom.rabbitmqMounts" $root)) }}
            {{- include "postroom.mount" "keys" | nindent 12 }}
            {{- if and (eq .component "worker") (or $values.smtp.ca.secret $values.smtp.ca.configMap) }}
            {{- include "postroom.mount" "smtp-ca" | nindent 12 }}
            {{- end }}
            {{- if $values.traces.headers.secret }}
            {{- include "postroom.mount" "traces" | nindent 12 }}
            {{- end }}
            {{- with $it.extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
        {{- with $it.extraContainers }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      volumes:
        {{- include "postroom.block" (list 8 (include "postroom.serverVolumes" (dict "root" $root "postgres" (include "postroom.postgresSecret" $root) "postgresKey" $values.postgres.urlKey "rabbitmq" (include "postroom.rabbitmqSecret" $root)))) }}
        {{- $keys := dict "encryption" $values.keys.encryptionKey }}
        {{- with $values.keys.overrideKey }}
        {{- $keys = merge $keys (dict "override" .) }}
        {{- end }}
        {{- include "postroom.secretVolume" (dict "name" "keys" "secret" (include "postroom.keysSecret" $root) "items" $keys) | nindent 8 }}
        {{- if eq .component "worker" }}
        {{- include "postroom.block" (list 8 (include "postroom.caVolume" (dict "name" "smtp-ca" "ca" $values.smtp.ca))) }}
        {{- end }}
        {{- with $values.traces.headers }}
        {{- if .secret }}
        {{- include "postroom.secretVolume" (dict "name" "traces" "secret" .secret "items" (dict "headers" .key)) | nindent 8 }}
        {{- end }}
        {{- end }}
        {{- if and $init $values.setup.postgres.secret }}
        {{- include "postroom.secretVolume" (dict "name" "setup-postgres" "secret" $values.setup.postgres.secret "items" (dict "url" $values.setup.postgres.urlKey)) | nindent 8 }}
        {{- end }}
        {{- if and $init $values.setup.topology $values.setup.rabbitmq.secret $values.rabbitmq.urlKey }}
        {{- include "postroom.secretVolume" (dict "name" "setup-rabbitmq" "secret" $values.setup.rabbitmq.secret "items" (dict "url" $values.rabbitmq.urlKey)) | nindent 8 }}
        {{- end }}
        {{- with $it.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      topologySpreadConstraints:
        {{- if $it.topologySpreadConstraints }}
        {{- toYaml $it.topologySpreadConstraints | nindent 8 }}
        {{- else }}
        {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
        - topologyKey: {{ $key }}
          maxSkew: 1
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              {{- include "postroom.selectorLabels" $ | nindent 14 }}
        {{- end }}
        {{- end }}
      {{- with $it.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      {{- with $it.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $it.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $it.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end -}}

{{/* The variables of a component. Arguments: root, component. */}}
{{- define "postroom.env" -}}
{{- $values := .root.Values -}}
{{- $settings := include "postroom.settingsOf" . | fromJson -}}
{{- include "postroom.rabbitmqEnv" (dict "root" .root "secret" (include "postroom.rabbitmqSecret" .root)) }}
{{ include "postroom.postgresEnv" .root }}
- name: POSTROOM_ENCRYPTION_KEYS_FILE
  value: /etc/postroom/keys/encryption
{{- if $values.keys.overrideKey }}
- name: POSTROOM_OVERRIDE_KEYS_FILE
  value: /etc/postroom/keys/override
{{- end }}
{{- if $values.traces.headers.secret }}
- name: OTEL_EXPORTER_OTLP_HEADERS_FILE
  value: /etc/postroom/traces/headers
{{- end }}
- name: POSTROOM_HTTP_ADDR
  value: {{ printf "%s:%d" $values.http.address (int $values.http.port) | quote }}
{{- if and $values.setup.topology (ne $values.setup.mode "none") (not $settings.topology) }}
- name: POSTROOM_TOPOLOGY
  value: check
{{- end }}
{{- if eq .component "worker" }}
{{- if or $values.smtp.ca.secret $values.smtp.ca.configMap }}
- name: POSTROOM_SMTP_CA_FILE
  value: /etc/postroom/smtp-ca/ca.crt
{{- end }}
{{- range $name, $value := dict "STORAGE_URL" $values.storage.url "STORAGE_PUBLIC_URL" $values.storage.publicUrl "LINK_LIFETIME" $values.storage.linkLifetime }}
{{- if $value }}
- name: POSTROOM_{{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
{{- range $name, $value := $values.storage.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
{{- include "postroom.settings" $settings }}
{{- with (index $values .component).extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}
