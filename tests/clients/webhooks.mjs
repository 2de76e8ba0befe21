// What a receiver does with what it was sent, with the unmodified libraries: verifies it with two of them, sees that a flipped byte does
// not pass, and holds it against its event's schema.
import { readFileSync } from 'node:fs'
import { Webhook } from 'standardwebhooks'
import { Webhook as SvixWebhook } from 'svix'
import Ajv from 'ajv/dist/2020.js'
import addFormats from 'ajv-formats'

const { received, schemas } = JSON.parse(readFileSync(process.env.RECEIVED, 'utf8'))
const ajv = new Ajv({ allErrors: true, strict: true, allowUnionTypes: true })
addFormats(ajv)
const validators = Object.fromEntries(Object.entries(schemas).map(([topic, schema]) => [topic, ajv.compile(schema)]))

const passes = (Verifier, secret, body, headers) => {
  try {
    new Verifier(secret).verify(body, headers)
    return true
  } catch {
    return false
  }
}
const told = { verified: 0, forged: 0, valid: 0, wrong: [], topics: {} }
for (const { secret, body, headers } of received) {
  const flipped = Buffer.from(body)
  flipped[headers['webhook-id'].charCodeAt(0) % flipped.length] ^= 1
  for (const Verifier of [Webhook, SvixWebhook]) {
    told.verified += passes(Verifier, secret, body, headers)
    told.forged += passes(Verifier, secret, flipped.toString('latin1'), headers)
  }
  const event = JSON.parse(body)
  const validate = validators[event.type]
  if (validate?.(event)) told.valid += 1
  else told.wrong.push({ type: event.type, errors: validate?.errors })
  told.topics[event.type] = (told.topics[event.type] ?? 0) + 1
}
console.log(JSON.stringify(told))
