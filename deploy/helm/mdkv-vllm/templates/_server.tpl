{{/* How `vllm serve` is called. */}}

{{/* The file that calibration writes for a setting, heads or basis. */}}
{{- define "mdkv-vllm.calibrated" -}}
/artifacts/mixeddim_{{ . }}.safetensors
{{- end }}

{{/* The mixeddim block, with the files that the calibration Job writes. */}}
{{- define "mdkv-vllm.settings" -}}
{{- $settings := deepCopy .Values.mixeddim }}
{{- if .Values.calibration.enabled }}
{{- if and .Values.calibration.headScores (not (hasKey $settings "heads")) }}
{{- $_ := set $settings "heads" (include "mdkv-vllm.calibrated" "heads") }}
{{- end }}
{{- if and .Values.calibration.basis (not (hasKey $settings "basis")) }}
{{- $_ := set $settings "basis" (include "mdkv-vllm.calibrated" "basis") }}
{{- end }}
{{- end }}
{{- dict "mixeddim" $settings | toJson }}
{{- end }}

{{- define "mdkv-vllm.ranks" -}}
{{- if eq .Values.device "cpu" }}1
{{- else if .Values.multiNode.enabled }}{{ mul .Values.gpu.count .Values.multiNode.nodes }}
{{- else }}{{ .Values.gpu.count | int }}
{{- end }}
{{- end }}

{{/* Takes root and role: server, leader or worker. */}}
{{- define "mdkv-vllm.arguments" -}}
{{- $values := .root.Values -}}
- serve
- {{ required "model.name is empty; name a folder under /models or a model on the hub" $values.model.name | quote }}
- --host=0.0.0.0
- --port={{ $values.server.port | int }}
- {{ printf "--served-model-name=%s" (include "mdkv-vllm.servedName" .root) | quote }}
{{- with $values.model.revision }}
- {{ printf "--revision=%s" . | quote }}
{{- end }}
- --attention-backend=mixeddim
- {{ printf "--additional-config=%s" (include "mdkv-vllm.settings" .root) | quote }}
- --shutdown-timeout={{ $values.server.drainSeconds | int }}
{{- with $values.server.maxModelLen }}
- --max-model-len={{ . | int }}
{{- end }}
{{- if or $values.server.enforceEager (eq $values.device "cpu") }}
- --enforce-eager
{{- end }}
{{- if gt (include "mdkv-vllm.ranks" .root | int) 1 }}
- --tensor-parallel-size={{ include "mdkv-vllm.ranks" .root }}
{{- end }}
{{- if ne .role "server" }}
- --nnodes=$(LWS_GROUP_SIZE)
- --node-rank=$(LWS_WORKER_INDEX)
- --master-addr=$(LWS_LEADER_ADDRESS)
{{- end }}
{{- if eq .role "worker" }}
- --headless
{{- end }}
{{- range $values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{- define "mdkv-vllm.servedName" -}}
{{- default .Values.model.name .Values.model.servedName }}
{{- end }}
