// Makes the calls that are described, each with its carrier's own SDK, against one listener. What an SDK makes of the answer is not asked.
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'

const { folders, listener, calls } = JSON.parse(readFileSync(process.env.TRUNKLINE, 'utf8'))
const sdk = (name, package_name = name) => createRequire(`${folders[name]}/x.js`)(package_name)

// Plivo's and Twilio's SDKs know their own host alone: what they send goes to the listener all the same.
const https = createRequire(import.meta.url)('node:https')
const http = createRequire(import.meta.url)('node:http')
const here = new URL(listener)
const carriers = new Set(['api.plivo.com', 'voice.plivo.com', 'api.twilio.com', 'api.telnyx.com', 'api.nexmo.com'])
const request = https.request
https.request = (...given) => {
  const options = typeof given[0] === 'object' && !(given[0] instanceof URL) ? given[0] : undefined
  const host = options?.hostname ?? options?.host
  if (!carriers.has(host)) return request(...given)
  const { agent, agents, port, defaultPort, protocol, host: _host, hostname, servername, ...rest } = options
  return http.request({ ...rest, protocol: 'http:', hostname: here.hostname, port: here.port }, ...given.slice(1))
}

const make = {
  async plivo({ account, secret, what, call, id }) {
    const client = new (sdk('plivo').Client)(account, secret)
    if (what === 'hangup') return client.calls.hangup(id)
    if (what === 'lookup') return client.calls.get(id)
    const { from, to, answer_url, ...rest } = call
    const camel = (name) => name.replace(/_(.)/g, (_, letter) => letter.toUpperCase())
    return client.calls.create(
      from, to, answer_url, Object.fromEntries(Object.entries(rest).map(([name, value]) => [camel(name), value])),
    )
  },
  async twilio({ account, secret, what, call, id }) {
    const client = sdk('twilio')(account, secret)
    if (what === 'hangup') return client.calls(id).update({ status: 'completed' })
    if (what === 'lookup') return client.calls(id).fetch()
    return client.calls.create(call)
  },
  async telnyx({ secret, what, call, id }) {
    const { Telnyx } = sdk('telnyx')
    const client = new Telnyx({ apiKey: secret, baseURL: `${listener}/v2`, maxRetries: 0 })
    if (what === 'hangup') return client.calls.actions.hangup(id, {})
    if (what === 'lookup') return client.calls.retrieveStatus(id)
    return client.calls.dial(call)
  },
  async vonage({ account, secret, what, call, id }) {
    const { Voice } = sdk('vonage', '@vonage/voice')
    const { Auth } = createRequire(createRequire(`${folders.vonage}/x.js`).resolve('@vonage/voice'))('@vonage/auth')
    const client = new Voice(new Auth({ applicationId: account, privateKey: secret }), { apiHost: listener })
    if (what === 'hangup') return client.hangupCall(id)
    if (what === 'lookup') return client.getCall(id)
    return client.createOutboundCall(call)
  },
}

const said = []
for (const asked of calls) {
  said.push(await make[asked.carrier](asked).then(() => null, (error) => String(error?.message ?? error)))
}
console.log(JSON.stringify({ said }))
process.exit(0)
