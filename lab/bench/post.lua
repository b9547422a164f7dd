-- wrk's requests: chat bodies of BODY_BYTES bytes, with KEY if it is not empty. Each goes on from one of 64 conversations and ends in its own words,
-- so that no two are the same and most share a prefix with an earlier one.
local size = tonumber(os.getenv("BODY_BYTES"))
math.randomseed(tonumber(os.getenv("SEED")))

local function letters(count)
  local out = {}
  for i = 1, count do out[i] = string.char(97 + math.random(0, 25)) end
  return table.concat(out)
end

local start = '{"model":"sim","messages":[{"role":"system","content":"'
local middle = '"},{"role":"user","content":"'
local stop = '"}],"max_tokens":1}'
local room = size - #start - #middle - #stop
local tail = math.floor(room / 8)
local heads = {}
for i = 1, 64 do heads[i] = start .. letters(room - tail) .. middle end
local filler = letters(tail)
local headers = { ["content-type"] = "application/json" }
if os.getenv("KEY") ~= "" then headers["authorization"] = "Bearer " .. os.getenv("KEY") end
local sent = 0

function request()
  sent = sent + 1
  local own = string.format("%d %d ", sent, math.random(0, 2 ^ 30))
  local body = heads[math.random(64)] .. own .. filler:sub(#own + 1) .. stop
  return wrk.format("POST", "/v1/chat/completions", headers, body)
end
