package sshkey

// loginKeyLabel keeps derived login keys apart from the other derived keys.
const loginKeyLabel = "compute-bridge/v1/login-key"

// LoginKey derives a login key for a grant, for receipts that carry it in clear
// (development): the same each time, so that it need not be stored anywhere.
// A key that is sealed to its requester is random instead, see
// [GenerateLoginKey], so that the worker can't make it again.
func (d *Deriver) LoginKey(requestID [32]byte) (KeyPair, error) {
	private, err := d.derive(append(append([]byte(loginKeyLabel), 0), requestID[:]...))
	if err != nil {
		return KeyPair{}, err
	}
	defer clear(private)
	return keyPair(private, 0, "compute-bridge login key")
}
