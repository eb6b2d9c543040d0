{{/* What the pods of servers and Jobs have in common, and the server's pod. */}}

{{- define "mdkv-vllm.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default (printf "%s-%s" .Chart.AppVersion .Values.device) .Values.image.tag }}
{{- end }}
{{- end }}

{{/* Image and rights of a container. */}}
{{- define "mdkv-vllm.container" -}}
image: {{ include "mdkv-vllm.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
{{- end }}

{{/* Identity and placement of a pod. */}}
{{- define "mdkv-vllm.placement" -}}
serviceAccountName: {{ include "mdkv-vllm.serviceAccountName" . }}
automountServiceAccountToken: false
# A Service named vllm would otherwise set VLLM_PORT, which vLLM reads as its own.
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.gpu.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Where models come from. */}}
{{- define "mdkv-vllm.modelEnvironment" -}}
- name: HF_HOME
  value: {{ ternary "/var/cache/mdkv/huggingface" "/models/huggingface" (eq .Values.models.volume "none") }}
{{- if .Values.huggingFace.offline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- with .Values.huggingFace.tokenSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.huggingFace.tokenKey }}
{{- end }}
{{- end }}

{{/* Takes root, and writable: whether artifacts may be written. */}}
{{- define "mdkv-vllm.volumeMounts" -}}
- name: cache
  mountPath: /var/cache/mdkv
- name: temporary
  mountPath: /tmp
- name: shared-memory
  mountPath: /dev/shm
{{- if ne .root.Values.models.volume "none" }}
- name: models
  mountPath: /models
  readOnly: {{ .root.Values.models.readOnly }}
{{- end }}
{{- if ne .root.Values.artifacts.volume "none" }}
- name: artifacts
  mountPath: /artifacts
  readOnly: {{ not .writable }}
{{- end }}
{{- end }}

{{- define "mdkv-vllm.volumes" -}}
- name: shared-memory
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.sharedMemory.size }}
{{- range $name := list "cache" "temporary" }}
- name: {{ $name }}
  emptyDir:
    sizeLimit: {{ $.Values.caches.sizeLimit }}
{{- end }}
{{- if ne .Values.models.volume "none" }}
- name: models
  persistentVolumeClaim:
    claimName: {{ include "mdkv-vllm.modelsClaim" . }}
    readOnly: {{ .Values.models.readOnly }}
{{- end }}
{{- if ne .Values.artifacts.volume "none" }}
- name: artifacts
  persistentVolumeClaim:
    claimName: {{ include "mdkv-vllm.artifactsClaim" . }}
{{- end }}
{{- end }}

{{/* A container that waits for a file. Takes root, name and path. */}}
{{- define "mdkv-vllm.waitFor" -}}
- name: {{ .name }}
  {{- include "mdkv-vllm.container" .root | nindent 2 }}
  command: [sh, -c, 'trap "exit 143" TERM; until [ -f "$0" ]; do sleep 2; done', {{ .path | quote }}]
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {memory: 64Mi}
  volumeMounts:
    {{- include "mdkv-vllm.volumeMounts" (dict "root" .root "writable" false) | nindent 4 }}
{{- end }}

{{/* What has to happen before a server starts. */}}
{{- define "mdkv-vllm.preparation" -}}
{{- if .Values.model.embedded }}
- name: unpack-model
  {{- include "mdkv-vllm.container" . | nindent 2 }}
  command: [mdkv, prepare-model, --out, {{ .Values.model.name | quote }}]
  resources:
    {{- toYaml .Values.resources | nindent 4 }}
  volumeMounts:
    {{- include "mdkv-vllm.volumeMounts" (dict "root" . "writable" false) | nindent 4 }}
{{- end }}
{{- if .Values.calibration.enabled }}
{{- $settings := (include "mdkv-vllm.settings" . | fromJson).mixeddim }}
{{- range $name := list "heads" "basis" }}
{{- $path := include "mdkv-vllm.calibrated" $name }}
{{- if eq (get $settings $name | default "") $path }}
{{ include "mdkv-vllm.waitFor" (dict "root" $ "name" (printf "wait-for-%s" $name) "path" $path) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Takes root and role: server, leader or worker. */}}
{{- define "mdkv-vllm.podTemplate" -}}
{{- $root := .root }}
{{- $values := .root.Values }}
{{- $resources := deepCopy $values.resources }}
{{- if eq $values.device "cuda" }}
{{- $gpus := dict $values.gpu.resourceName ($values.gpu.count | int) }}
{{- $_ := set $resources "limits" (merge $gpus (default dict $resources.limits)) }}
{{- end -}}
metadata:
  labels:
    {{- include "mdkv-vllm.labels" $root | nindent 4 }}
    app.kubernetes.io/component: server
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: vllm
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "mdkv-vllm.placement" $root | nindent 2 }}
  {{- with $values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    {{- $selector := dict "matchLabels" (include "mdkv-vllm.serverSelector" $root | fromYaml) }}
    - {{- merge (deepCopy .) (dict "labelSelector" $selector) | toYaml | nindent 6 }}
    {{- end }}
  {{- end }}
  terminationGracePeriodSeconds: {{ add $values.server.preStopSeconds $values.server.drainSeconds 30 }}
  {{- with include "mdkv-vllm.preparation" $root | trim }}
  initContainers:
    {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: vllm
      {{- include "mdkv-vllm.container" $root | nindent 6 }}
      command: [vllm]
      args:
        {{- include "mdkv-vllm.arguments" . | nindent 8 }}
      env:
        {{- include "mdkv-vllm.modelEnvironment" $root | nindent 8 }}
        {{- if $values.apiKey.enabled }}
        - name: VLLM_API_KEY
          valueFrom:
            secretKeyRef:
              name: {{ include "mdkv-vllm.apiKeySecret" $root }}
              key: {{ $values.apiKey.secretKey }}
        {{- end }}
        {{- if $values.server.statusEndpoint }}
        - name: VLLM_PLUGINS
          value: mixeddim
        {{- end }}
        {{- if eq $values.device "cpu" }}
        - name: VLLM_CPU_KVCACHE_SPACE
          value: {{ $values.cpu.kvCacheGiB | quote }}
        {{- end }}
        {{- with $values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if ne .role "worker" }}
      ports:
        - name: http
          containerPort: {{ $values.server.port | int }}
      {{- range $name := list "startup" "readiness" "liveness" }}
      {{ $name }}Probe:
        httpGet: {path: /health, port: http}
        {{- toYaml (get $values.probes $name) | nindent 8 }}
      {{- end }}
      {{- end }}
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ $values.server.preStopSeconds | quote }}]
      resources:
        {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        {{- include "mdkv-vllm.volumeMounts" (dict "root" $root "writable" false) | nindent 8 }}
        {{- with $values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    {{- include "mdkv-vllm.volumes" $root | nindent 4 }}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
