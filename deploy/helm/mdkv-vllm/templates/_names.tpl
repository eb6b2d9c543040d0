{{/* Names and labels, as `helm create` lays them out. */}}

{{- define "mdkv-vllm.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{/* 40 characters at most, which leaves room for what controllers append. */}}
{{- define "mdkv-vllm.fullname" -}}
{{- $name := include "mdkv-vllm.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "mdkv-vllm.selector" -}}
app.kubernetes.io/name: {{ include "mdkv-vllm.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Pods that answer requests; of a group over several nodes, only the leader. */}}
{{- define "mdkv-vllm.serverSelector" -}}
{{ include "mdkv-vllm.selector" . }}
app.kubernetes.io/component: server
{{- if .Values.multiNode.enabled }}
leaderworkerset.sigs.k8s.io/worker-index: "0"
{{- end }}
{{- end }}

{{- define "mdkv-vllm.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "mdkv-vllm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "mdkv-vllm.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "mdkv-vllm.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "mdkv-vllm.apiKeySecret" -}}
{{- default (printf "%s-api-key" (include "mdkv-vllm.fullname" .)) .Values.apiKey.existingSecret }}
{{- end }}

{{- define "mdkv-vllm.modelsClaim" -}}
{{- if eq .Values.models.volume "existing" }}{{ .Values.models.existingClaim }}{{ else }}{{ include "mdkv-vllm.fullname" . }}-models{{ end }}
{{- end }}

{{- define "mdkv-vllm.artifactsClaim" -}}
{{- if eq .Values.artifacts.volume "existing" }}{{ .Values.artifacts.existingClaim }}{{ else }}{{ include "mdkv-vllm.fullname" . }}-artifacts{{ end }}
{{- end }}

{{/* Pods of this release's servers, as a regular expression on Prometheus' label pod. */}}
{{- define "mdkv-vllm.podPattern" -}}
{{ include "mdkv-vllm.fullname" . }}-[a-z0-9]+(-[a-z0-9]+)?
{{- end }}

{{/* What an autoscaler scales. */}}
{{- define "mdkv-vllm.scaleTarget" -}}
{{- if .Values.multiNode.enabled -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
{{- else -}}
apiVersion: apps/v1
kind: Deployment
{{- end }}
name: {{ include "mdkv-vllm.fullname" . }}
{{- end }}
