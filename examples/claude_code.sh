#!/bin/sh
# Claude Code: Anthropic's coding agent.
#
# It reads ANTHROPIC_BASE_URL (without /v1) and takes the key from ANTHROPIC_API_KEY. In its menu it offers names that begin
# with claude: give the model one, `SERVED_MODEL_NAME=qwen,claude-local`. Its instructions take some 20,000 tokens, so
# `MAX_MODEL_LEN` must be well above that.
set -eu
export CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 DISABLE_AUTOUPDATER=1
export ANTHROPIC_MODEL="$MODEL" ANTHROPIC_DEFAULT_HAIKU_MODEL="$MODEL"
npx --yes @anthropic-ai/claude-code@2.1.332 --print 'Say hello.'
