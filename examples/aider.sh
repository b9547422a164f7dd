#!/bin/sh
# aider: pair programming in the terminal.
#
# The model's name takes the prefix openai/, which says how to speak to it.
set -eu
export OPENAI_API_BASE="$OPENAI_BASE_URL"
uvx --from aider-chat==0.86.2 aider --model "openai/$MODEL" --no-git --no-check-update --no-show-model-warnings \
  --no-show-release-notes --analytics-disable --no-pretty --yes-always --chat-mode ask --message 'Say hello.'
