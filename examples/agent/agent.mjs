// A minimal voice agent: takes a carrier's stream, answers with sound, reports what became of the call. See README.md.
import { createHmac, randomUUID, timingSafeEqual } from 'node:crypto'
import { createServer } from 'node:http'
import { setTimeout as sleep } from 'node:timers/promises'
import { WebSocketServer } from 'ws'

const setting = (name, or) => process.env[name] ?? or ?? (() => { throw new Error(`${name} is not set`) })()
const key = Buffer.from(setting('AGENT_KEY'), 'hex')
const trunkline = setting('TRUNKLINE_URL').replace(/\/$/, '')
const reportUrl = setting('REPORT_URL')
const reportSecret = Buffer.from(setting('REPORT_SECRET').replace(/^whsec_/, ''), 'base64')
const PING_MS = 20_000
const REPORTS = 8

// Whether a token opens this attempt's socket: docs/providers.md says how it is made.
const isOurs = (attempt, token) => {
  const [, head, signature] = /^(v1\.\d+\.\d+\.[0-9a-f-]{36})\.([\w-]{22})$/.exec(token) ?? []
  if (!head) return false
  const made = createHmac('sha256', key).update(`${head}.${attempt}`).digest().subarray(0, 16)
  return timingSafeEqual(made, Buffer.from(signature, 'base64url')) && Date.now() / 1000 <= Number(head.split('.')[2])
}

const tell = async (url, body, headers = {}) => {
  const answer = await fetch(url, { method: 'POST', headers: { 'content-type': 'application/json', ...headers }, body })
  const told = await answer.json().catch(() => ({}))
  return { status: answer.status, told }
}

// Signed by Standard Webhooks, and sent again under the same id until it is taken.
const report = async (type, data) => {
  const id = `msg_${randomUUID()}`
  const body = JSON.stringify({ type, data })
  for (let tries = 0; tries < REPORTS; tries += 1) {
    const time = Math.floor(Date.now() / 1000)
    const signature = createHmac('sha256', reportSecret).update(`${id}.${time}.${body}`).digest('base64')
    const headers = { 'webhook-id': id, 'webhook-timestamp': String(time), 'webhook-signature': `v1,${signature}` }
    const { status } = await tell(reportUrl, body, headers).catch(() => ({ status: 0 }))
    if (status >= 200 && status < 300) return
    if (status >= 400 && status < 500 && status !== 429) return console.error(`the report was refused: ${status}`)
    await sleep(1000 * 2 ** tries)
  }
  console.error('the report was given up')
}

// G.711 µ-law of a sample between -1 and 1.
const mulaw = (sample) => {
  const sign = sample < 0 ? 0x80 : 0
  let value = Math.min(Math.round(Math.abs(sample) * 32_635), 32_635) + 132
  let exponent = 7
  for (let mask = 0x4000; exponent > 0 && !(value & mask); mask >>= 1) exponent -= 1
  return ~(sign | (exponent << 4) | ((value >> (exponent + 3)) & 0x0f)) & 0xff
}
// 440 Hz for half a second, at 8 kHz.
const tone = Buffer.from(Array.from({ length: 4000 }, (_, at) => mulaw(0.3 * Math.sin((2 * Math.PI * 440 * at) / 8000))))

const server = createServer((_, response) => response.writeHead(200).end('an agent\n'))
const sockets = new WebSocketServer({ noServer: true, maxPayload: 64 * 1024 })

server.on('upgrade', async (request, socket, head) => {
  const refuse = (line) => socket.end(`HTTP/1.1 ${line}\r\nConnection: close\r\n\r\n`)
  const [, attempt, token] = /^\/stream\/([0-9a-f-]{36})\/([\w.-]+)(?:\?.*)?$/.exec(request.url) ?? []
  if (!attempt || !isOurs(attempt, token)) return refuse('403 Forbidden')
  const stream = `${trunkline}/webhook-intake/streams/${attempt}/${token}`
  const connection = JSON.stringify({ connection_id: randomUUID() })
  const opened = await tell(`${stream}/open`, connection).catch(() => ({ status: 503 }))
  if (opened.status !== 200) return refuse(opened.status === 409 ? '409 Conflict' : '503 Service Unavailable')
  sockets.handleUpgrade(request, socket, head, (ws) => converse(ws, attempt, stream, connection))
})

const converse = (ws, attempt, stream, connection) => {
  const began = Date.now()
  let firstAudio
  let heard = 0
  let callId
  let streamId

  const say = (sound) => {
    if (ws.readyState !== ws.OPEN) return
    const payload = sound.toString('base64')
    // Twilio names the stream in what it is sent; Plivo wants the format.
    ws.send(JSON.stringify(
      callId?.startsWith('CA')
        ? { event: 'media', streamSid: streamId, media: { payload } }
        : { event: 'playAudio', media: { contentType: 'audio/x-mulaw', sampleRate: 8000, payload } },
    ))
    firstAudio ??= Date.now() - began
  }
  // Here is the place of a model: it gets what the caller says, twenty milliseconds at a time.
  const hear = (sound) => {
    heard += sound.length
    say(sound)
  }

  ws.on('message', (data) => {
    let message
    try { message = JSON.parse(data) } catch { return }
    if (message.event === 'start') {
      callId = message.start?.callSid ?? message.start?.callId
      streamId = message.start?.streamSid ?? message.start?.streamId
      say(tone)
    }
    if (message.event === 'media' && message.media?.payload) hear(Buffer.from(message.media.payload, 'base64'))
    if (message.event === 'stop') ws.close()
  })
  const pinging = setInterval(async () => {
    const { told } = await tell(`${stream}/ping`, connection).catch(() => ({}))
    if (told?.gone) ws.close()
  }, PING_MS)
  ws.on('error', () => ws.terminate())
  ws.on('close', async () => {
    clearInterval(pinging)
    await tell(`${stream}/close`, connection).catch(() => {})
    const seconds = Math.round((Date.now() - began) / 1000)
    await report('agent.ended', {
      attempt_id: attempt,
      agent_call_id: JSON.parse(connection).connection_id,
      started_at: new Date(began).toISOString(),
      ended_at: new Date().toISOString(),
      duration_seconds: seconds,
      first_audio_ms: firstAudio,
      summary: `Repeated ${(heard / 8000).toFixed(1)} seconds of what the caller said.`,
    })
  })
}

server.listen(Number(setting('PORT', '8080')), () => console.log(`listening on ${server.address().port}`))
