#!/bin/sh
# Codex: OpenAI's coding agent.
#
# It speaks only the Responses API. Its instructions take some 10,000 tokens, so `MAX_MODEL_LEN` must be well above that. It
# names its session in a header, which keeps a conversation on one replica.
set -eu
npx --yes @openai/codex@0.171.0 exec --skip-git-repo-check --sandbox read-only --model "$MODEL" \
  --config model_provider=fleet --config model_providers.fleet.name=fleet \
  --config "model_providers.fleet.base_url=$OPENAI_BASE_URL" \
  --config model_providers.fleet.wire_api=responses --config model_providers.fleet.env_key=OPENAI_API_KEY \
  'Say hello.'
