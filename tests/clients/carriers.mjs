// What the carriers' own SDKs say: of requests that we signed, of requests that they sign, and of documents that they write.
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'

const { folders, requests, to_sign, documents } = JSON.parse(readFileSync(process.env.TRUNKLINE, 'utf8'))
const sdk = (name, package_name = name) => createRequire(`${folders[name]}/x.js`)(package_name)
const plivo = sdk('plivo')
const twilio = sdk('twilio')
const { Telnyx } = sdk('telnyx')
const { verifySignature } = sdk('vonage', '@vonage/jwt')

// A parameter that comes several times is a list.
const parameters = (pairs) => {
  const read = {}
  for (const [name, value] of pairs) read[name] = name in read ? [].concat(read[name], value) : value
  return read
}

const verdicts = []
for (const { carrier, url, headers, body, form, credentials } of requests) {
  switch (carrier) {
    case 'plivo': {
      const nonce = headers['x-plivo-signature-v3-nonce']
      const signature = headers['x-plivo-signature-v3']
      verdicts.push(plivo.validateV3Signature('POST', url, nonce, credentials.auth_token, signature, parameters(form)))
      break
    }
    case 'twilio':
      verdicts.push(twilio.validateRequest(credentials.auth_token, headers['x-twilio-signature'], url, parameters(form)))
      break
    case 'telnyx':
      verdicts.push(
        await new Telnyx({ apiKey: 'none', publicKey: credentials.public_key }).webhooks.unwrap(body, { headers }).then(
          () => true,
          () => false,
        ),
      )
      break
    case 'vonage':
      verdicts.push(verifySignature(headers.authorization.replace('Bearer ', ''), credentials.signature_secret))
      break
  }
}

// Twilio's SDK signs too.
const signatures = to_sign.map(({ url, form, json, token }) => {
  if (json === null) return { url, signature: twilio.getExpectedTwilioSignature(token, url, parameters(form)) }
  const bound = `${url}${url.includes('?') ? '&' : '?'}bodySHA256=${twilio.getExpectedBodyHash(json)}`
  return { url: bound, signature: twilio.getExpectedTwilioSignature(token, bound, {}) }
})

const written = documents.map(({ carrier, what, url, callback, parameters: named, to, caller }) => {
  if (carrier === 'plivo') {
    const response = plivo.Response()
    if (what === 'connect') {
      response.addRecord({
        fileFormat: 'mp3', maxLength: 3600, recordSession: true, callbackUrl: callback, callbackMethod: 'POST',
      })
      response.addStream(url, {
        bidirectional: true, statusCallbackUrl: callback, statusCallbackMethod: 'POST',
        contentType: 'audio/x-mulaw;rate=8000', keepCallAlive: true,
      })
    } else if (what === 'dial') {
      response
        .addDial({ action: callback, method: 'POST', timeLimit: 60, timeout: 30, callerId: caller.slice(1), redirect: false })
        .addNumber(to.slice(1))
      response.addHangup()
    } else response.addHangup(what === 'busy' ? { reason: 'busy' } : {})
    return response.toXML()
  }
  const response = new twilio.twiml.VoiceResponse()
  if (what === 'connect') {
    const stream = response.connect().stream({ statusCallback: callback, statusCallbackMethod: 'POST', url })
    for (const [name, value] of named) stream.parameter({ name, value })
  } else if (what === 'dial') {
    response
      .dial({ action: callback, answerOnBridge: true, callerId: caller, method: 'POST', timeLimit: 60, timeout: 30 })
      .number(to)
  } else if (what === 'busy') response.reject({ reason: 'busy' })
  else response.hangup()
  return response.toString()
})

console.log(JSON.stringify({ verdicts, signatures, written }))
